//! Identities that cannot be confused with each other and cannot be malformed.
//!
//! An id is 64 lowercase hexadecimal digits: what cAdvisor and log collectors expect to find in cgroup and file names.
//! Because nothing else passes `parse`, an id is always safe as a path component.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Length of an id in characters.
pub const LEN: usize = 64;

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Malformed(String);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The text is a peer's: show little of it, and escaped.
        let shown: String = self.0.chars().take(80).collect();
        write!(f, "{shown:?} is not an id of {LEN} hexadecimal digits")
    }
}

impl std::error::Error for Malformed {}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Box<str>);

        impl $name {
            /// A new random id.
            ///
            /// # Panics
            /// If the kernel has no random numbers, which it always has after boot.
            pub fn generate() -> $name {
                $name(random_hex().into())
            }

            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = Malformed;
            fn from_str(text: &str) -> Result<$name, Malformed> {
                let digits = text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
                if text.len() == LEN && digits { Ok($name(text.into())) } else { Err(Malformed(text.into())) }
            }
        }

        impl TryFrom<String> for $name {
            type Error = Malformed;
            fn try_from(text: String) -> Result<$name, Malformed> {
                text.parse()
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0.into()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(
    /// Names a pod.
    PodId
);
id!(
    /// Names a container.
    ContainerId
);
id!(
    /// Names an exec.
    ExecId
);

fn random_hex() -> String {
    let mut bytes = [0_u8; LEN / 2];
    let mut filled = 0;
    while filled < bytes.len() {
        match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => filled += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => panic!("the kernel gives no random numbers: {e}"),
        }
    }
    hex::encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_ids_parse_and_differ() {
        let (a, b) = (PodId::generate(), PodId::generate());
        assert_ne!(a, b);
        assert_eq!(a.as_str().parse::<PodId>().unwrap(), a);
    }

    #[test]
    fn only_64_lowercase_hex_digits_are_an_id() {
        let good = "0123456789abcdef".repeat(4);
        assert!(good.parse::<ContainerId>().is_ok());
        for bad in
            ["", "..", "a", &good[1..], &good.to_uppercase(), &good.replace('0', "/"), &format!("{good}0")]
        {
            assert!(bad.parse::<ContainerId>().is_err(), "{bad}");
        }
    }
}
