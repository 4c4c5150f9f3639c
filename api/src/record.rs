//! What a pod's directory says: the on-disk form is the wire form.
//!
//! The shim writes, everybody may read. `record` files are replaced by rename, so a reader sees the old or the new one.
//! The `exit` file is different: it is written in place, into blocks allocated when the container was created, so that
//! a full disk cannot lose an exit. It holds the length and a checksum before the message, and zeros until then.

use std::path::Path;
use std::{fs, io};

use protobuf::Message;

use crate::id::{ContainerId, PodId};
use crate::paths::{Dirs, PodPaths};
use crate::shim::{ContainerPhase, ContainerState, Exit, PodState};

/// Size of the exit file in bytes; larger than any [`Exit`], whose message is bounded by 1 KiB.
pub const EXIT_FILE_BYTES: usize = 4096;

/// Longest record that is read, in bytes. A record is some hundred bytes plus the paths of up to 500 layers.
const RECORD_BYTES_MAX: u64 = 4 << 20;

/// The ids of all pods that have a directory, in no order. Names that are not ids are passed over.
///
/// # Errors
/// If the directory exists and cannot be read.
pub fn pods(dirs: &Dirs) -> io::Result<Vec<PodId>> {
    ids(&dirs.records())
}

/// The ids of all containers of a pod that have a directory.
///
/// # Errors
/// If the directory exists and cannot be read.
pub fn containers(pod: &PodPaths) -> io::Result<Vec<ContainerId>> {
    ids(&pod.containers())
}

fn ids<T: std::str::FromStr>(dir: &Path) -> io::Result<Vec<T>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut found = Vec::new();
    for entry in entries {
        if let Some(id) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) {
            found.push(id);
        }
    }
    Ok(found)
}

/// The pod's recorded state, its containers included. `None` if it was never recorded.
///
/// A container whose record is missing does not exist; one whose record cannot be read is left out, so that one bad
/// file hides one container and not the pod.
///
/// # Errors
/// If the pod's own record exists and cannot be read or understood.
pub fn read_pod(pod: &PodPaths) -> io::Result<Option<PodState>> {
    let Some(bytes) = read(&pod.record())? else { return Ok(None) };
    let mut state = PodState::parse_from_bytes(&bytes).map_err(io::Error::other)?;
    named(&state.pod, pod.record_dir())?;
    state.containers.clear();
    for id in containers(pod)? {
        if let Ok(Some(container)) = read_container(pod, &id) {
            state.containers.push(container);
        }
    }
    Ok(Some(state))
}

/// A container's recorded state with its exit, if it has one.
///
/// # Errors
/// If the record exists and cannot be read or understood.
pub fn read_container(pod: &PodPaths, id: &ContainerId) -> io::Result<Option<ContainerState>> {
    let paths = pod.container(id);
    let Some(bytes) = read(&paths.record())? else { return Ok(None) };
    let mut state = ContainerState::parse_from_bytes(&bytes).map_err(io::Error::other)?;
    named(&state.container, paths.record_dir())?;
    if let Some(exit) = read(&paths.exit())?.as_deref().and_then(decode_exit) {
        state.phase = ContainerPhase::CONTAINER_EXITED.into();
        state.pid = 0;
        state.exit = Some(exit).into();
    }
    Ok(Some(state))
}

/// A record says whose it is. One that does not is none, though it can be parsed: to protobuf, an empty file is a
/// message with nothing set.
fn named(id: &str, dir: &Path) -> io::Result<()> {
    match dir.file_name().is_some_and(|name| name == id) {
        true => Ok(()),
        false => Err(io::Error::other(format!("the record in {} is not its own", dir.display()))),
    }
}

/// Reads a file of bounded size. `None` if there is none.
///
/// # Errors
/// If it exists and cannot be read, or is larger than a record can be.
pub fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    use std::io::Read;
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut bytes = Vec::new();
    file.take(RECORD_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > RECORD_BYTES_MAX {
        return Err(io::Error::other(format!("{} is larger than {RECORD_BYTES_MAX} bytes", path.display())));
    }
    Ok(Some(bytes))
}

/// The content of an exit file.
///
/// # Errors
/// If the message does not fit, which a bounded [`Exit`] always does.
pub fn encode_exit(exit: &Exit) -> io::Result<Vec<u8>> {
    let message = exit.write_to_bytes().map_err(io::Error::other)?;
    let length = u32::try_from(message.len()).map_err(io::Error::other)?;
    let mut file = Vec::with_capacity(8 + message.len());
    file.extend_from_slice(&length.to_le_bytes());
    file.extend_from_slice(&fnv1a(&message).to_le_bytes());
    file.extend_from_slice(&message);
    if file.len() > EXIT_FILE_BYTES {
        return Err(io::Error::other("exit message larger than its file"));
    }
    Ok(file)
}

/// The exit in an exit file; `None` if there is none yet or it is torn.
pub fn decode_exit(file: &[u8]) -> Option<Exit> {
    let (length, rest) = file.split_first_chunk::<4>()?;
    let (checksum, rest) = rest.split_first_chunk::<4>()?;
    let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
    let message = rest.get(..length).filter(|_| length > 0)?;
    (fnv1a(message) == u32::from_le_bytes(*checksum)).then(|| Exit::parse_from_bytes(message).ok())?
}

/// FNV-1a: enough to tell a torn write from a whole one.
fn fnv1a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_survives_its_file_and_a_torn_one_is_no_exit() {
        let exit = Exit { code: 137, signal: 9, finished_at_ns: 5, ..Default::default() };
        let mut file = encode_exit(&exit).unwrap();
        file.resize(EXIT_FILE_BYTES, 0);
        assert_eq!(decode_exit(&file), Some(exit));
        file[9] ^= 1;
        assert_eq!(decode_exit(&file), None);
        assert_eq!(decode_exit(&[0; EXIT_FILE_BYTES]), None);
        assert_eq!(decode_exit(&[]), None);
    }
}
