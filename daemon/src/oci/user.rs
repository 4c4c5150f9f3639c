//! Users and groups by name, against the text of an image's passwd and group files.
//!
//! The files are the image author's: of bounded size, and lines that make no sense are passed over. A number is a number:
//! it is never looked up as a name, for the author could map it to root.

use crate::error::{Error, Result};
use crate::spec::{ContainerSecurity, GroupsPolicy, RunAs};

/// Who a process runs as.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct User {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// All groups, the primary one first, without repetition.
    pub additional_gids: Vec<u32>,
}

/// The most that we read of passwd and of group.
pub const FILE_BYTES_MAX: usize = 10 << 20;

/// The largest id: above it are ids that some interface of the kernel takes for "none" or "keep".
const ID_MAX: u64 = 0x7fff_ffff;

/// The kernel's NGROUPS_MAX.
const GROUPS_MAX: usize = 65_536;

/// Finds out who a container runs as. `image_user` is the image's USER; `passwd` and `group` are its files, empty if it
/// has none.
///
/// # Errors
/// `InvalidArgument` if a name is not in the files, or a number is out of range.
pub fn resolve(security: &ContainerSecurity, image_user: &str, passwd: &[u8], group: &[u8]) -> Result<User> {
    if passwd.len() > FILE_BYTES_MAX || group.len() > FILE_BYTES_MAX {
        return Err(Error::invalid(format!(
            "the image's passwd or group has more than {FILE_BYTES_MAX} bytes"
        )));
    }
    let (user, image_group) = match &security.run_as {
        RunAs::Uid(uid) => (Id::Number(*uid), None),
        RunAs::Name(name) => (id("run_as_username", name)?, None),
        RunAs::Image if image_user.is_empty() => (Id::Number(0), None),
        RunAs::Image => {
            let (user, group) = match image_user.split_once(':') {
                Some((user, group)) => (user, Some(group)),
                None => (image_user, None),
            };
            let group = group.filter(|group| !group.is_empty());
            (
                id("the image's USER", user)?,
                group.map(|group| id("the group of the image's USER", group)).transpose()?,
            )
        }
    };
    let entry = entries::<7>(passwd).find_map(|fields| {
        let entry = PasswdEntry::parse(fields)?;
        let same = match &user {
            Id::Number(uid) => entry.uid == *uid,
            Id::Name(name) => entry.name == name.as_bytes(),
        };
        same.then_some(entry)
    });
    let uid = match (&user, &entry) {
        (Id::Number(uid), _) => *uid,
        (Id::Name(_), Some(entry)) => entry.uid,
        (Id::Name(name), None) => {
            return Err(Error::invalid(format!("the image's passwd has no user {name:?}")));
        }
    };
    let gid = match (security.run_as_group, image_group) {
        (Some(gid), _) => gid,
        (None, Some(Id::Number(gid))) => gid,
        (None, Some(Id::Name(name))) => group_id(group, &name)?,
        (None, None) => entry.as_ref().map_or(0, |entry| entry.gid),
    };

    let mut groups = vec![gid];
    if let (GroupsPolicy::Merge, Some(entry)) = (security.supplemental_groups_policy, &entry) {
        groups.extend(groups_of(group, entry.name));
    }
    groups.extend(&security.supplemental_groups);
    Ok(User { uid, gid, additional_gids: unique(groups)? })
}

/// A user or group, as somebody wrote it.
#[derive(Debug, PartialEq, Eq)]
enum Id {
    Number(u32),
    Name(String),
}

/// All digits is a number, in range or not. A name begins with a letter or an underscore, so what looks like a number of
/// another kind (`-1`, `+0`, `0x0`, ` 0`) is neither.
fn id(field: &str, text: &str) -> Result<Id> {
    let shown = || text.chars().take(64).collect::<String>();
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        let number = text.parse::<u64>().ok().filter(|number| *number <= ID_MAX);
        return number
            .and_then(|number| u32::try_from(number).ok())
            .map(Id::Number)
            .ok_or_else(|| Error::invalid(format!("{field} {:?} is larger than {ID_MAX}", shown())));
    }
    let begins_well = text.chars().next().is_some_and(|c| c.is_alphabetic() || c == '_');
    let is_name = begins_well
        && text.len() <= 256
        && !text.chars().any(|c| c == ':' || c.is_control() || c.is_whitespace());
    if !is_name {
        return Err(Error::invalid(format!("{field} {:?} is neither a number nor a name", shown())));
    }
    Ok(Id::Name(text.to_owned()))
}

struct PasswdEntry<'a> {
    name: &'a [u8],
    uid: u32,
    gid: u32,
}

impl<'a> PasswdEntry<'a> {
    fn parse(fields: [&'a [u8]; 7]) -> Option<PasswdEntry<'a>> {
        let [name, _, uid, gid, ..] = fields;
        Some(PasswdEntry { name, uid: number(uid)?, gid: number(gid)? })
    }
}

fn group_id(group: &[u8], name: &str) -> Result<u32> {
    entries::<4>(group)
        .find_map(|[entry, _, gid, _]| if entry == name.as_bytes() { number(gid) } else { None })
        .ok_or_else(|| Error::invalid(format!("the image's group has no group {name:?}")))
}

/// The groups that have that user as a member.
fn groups_of<'a>(group: &'a [u8], user: &'a [u8]) -> impl Iterator<Item = u32> + 'a {
    entries::<4>(group)
        .filter(move |[.., members]| members.split(|b| *b == b',').any(|member| member == user))
        .filter_map(|[_, _, gid, _]| number(gid))
}

/// The lines that have at least the first three of `N` fields; those that are missing at the end are empty.
fn entries<const N: usize>(file: &[u8]) -> impl Iterator<Item = [&[u8]; N]> {
    file.split(|b| *b == b'\n').filter_map(|line| {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() || line.starts_with(b"#") {
            return None;
        }
        let mut fields = [&b""[..]; N];
        let mut count = 0;
        for (slot, field) in fields.iter_mut().zip(line.splitn(N, |b| *b == b':')) {
            *slot = field;
            count += 1;
        }
        (count >= 3 && !fields[0].is_empty()).then_some(fields)
    })
}

fn number(digits: &[u8]) -> Option<u32> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number: u64 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    u32::try_from(number).ok().filter(|_| number <= ID_MAX)
}

/// Each once, in the order of their first mention.
fn unique(groups: Vec<u32>) -> Result<Vec<u32>> {
    let mut seen = std::collections::HashSet::new();
    let groups: Vec<u32> = groups.into_iter().filter(|gid| seen.insert(*gid)).collect();
    if groups.len() > GROUPS_MAX {
        return Err(Error::invalid(format!(
            "the user is in {} groups, more than {GROUPS_MAX}",
            groups.len()
        )));
    }
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n# comment\nbroken\n:x:5:5::/:\n\xff\xfe:x:6:6\n\
        daemon:x:1:1\nweb:x:1000:1000:Web,,,:/home/web:/bin/sh\r\nneg:x:-1:0:::\nbig:x:4294967296:0:::\n\
        2147483648:x:0:0::/:/bin/sh\n-1:x:0:0::/:/bin/sh\n+0:x:0:0::/:/bin/sh\n0x0:x:0:0::/:/bin/sh\n 0:x:0:0::/:/bin/sh\n";
    const GROUP: &[u8] =
        b"root:x:0:root\nweb:x:1000:\nstaff:x:50000:web,daemon\nextra:x:60:webb,web\nbad:x:nan:web\n";

    fn run(run_as: RunAs, image_user: &str) -> Result<User> {
        resolve(&ContainerSecurity { run_as, ..Default::default() }, image_user, PASSWD, GROUP)
    }

    fn user(uid: u32, gid: u32, groups: &[u32]) -> User {
        User { uid, gid, additional_gids: groups.to_vec() }
    }

    #[test]
    fn users_and_groups_are_found() {
        let web = user(1000, 1000, &[1000, 50000, 60]);
        for (image_user, expected) in [
            ("", user(0, 0, &[0])),
            ("root", user(0, 0, &[0])),
            ("00", user(0, 0, &[0])),
            ("web", web.clone()),
            ("1000", web.clone()),
            ("web:", web.clone()),
            ("1000:staff", user(1000, 50000, &[50000, 60])),
            ("web:7", user(1000, 7, &[7, 50000, 60])),
            ("4711", user(4711, 0, &[0])),
            ("2147483647:2147483647", user(2_147_483_647, 2_147_483_647, &[2_147_483_647])),
            ("daemon", user(1, 1, &[1, 50000])),
        ] {
            assert_eq!(run(RunAs::Image, image_user).unwrap(), expected, "{image_user:?}");
        }
        assert_eq!(run(RunAs::Name("web".into()), "root").unwrap(), web);
        assert_eq!(run(RunAs::Uid(1000), "root:0").unwrap(), web);
    }

    #[test]
    fn what_looks_like_a_number_is_never_looked_up_as_a_name() {
        for text in [
            "2147483648",
            "4294967295",
            "4294967296",
            "18446744073709551616",
            "-1",
            "+0",
            "0x0",
            " 0",
            "0 ",
            "1:4294967296",
            "1:-1",
            ":",
            ":0",
            "web:nobody",
            "nobody",
            "neg",
            "big",
            "a b",
            "\u{661}",
            "web:a:b",
        ] {
            assert!(run(RunAs::Image, text).is_err(), "{text:?}");
        }
        assert!(run(RunAs::Name("2147483648".into()), "").is_err());
    }

    #[test]
    fn strict_takes_only_the_groups_of_the_request() {
        let mut security = ContainerSecurity {
            run_as: RunAs::Uid(1000),
            supplemental_groups: vec![1234, 1000, 1234],
            ..Default::default()
        };
        let groups =
            |security: &ContainerSecurity| resolve(security, "", PASSWD, GROUP).unwrap().additional_gids;
        assert_eq!(groups(&security), [1000, 50000, 60, 1234]);
        security.supplemental_groups_policy = GroupsPolicy::Strict;
        assert_eq!(groups(&security), [1000, 1234]);
        security.run_as_group = Some(2000);
        assert_eq!(groups(&security), [2000, 1234, 1000]);
    }

    #[test]
    fn files_that_are_too_large_are_refused() {
        let large = vec![b'\n'; FILE_BYTES_MAX + 1];
        assert!(resolve(&ContainerSecurity::default(), "", &large, b"").is_err());
        assert!(resolve(&ContainerSecurity::default(), "", b"", &large).is_err());
    }
}
