//! What must survive us, written before it is needed.
//!
//! A record is replaced whole: a temporary file beside it, then rename, so that a crash leaves the old or the new one.
//! The exit file is different: its blocks are allocated when the container is created and one write fills them, so that
//! a full disk cannot lose an exit. Nothing here waits for the disk but [`flush`], which is called for the pod's identity
//! and network only: every other step survives any crash of ours, and may lose the last moment before a power cut.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use ocid_api::paths::{ContainerPaths, PodPaths};
use ocid_api::record::{EXIT_FILE_BYTES, encode_exit};
use ocid_api::shim::{ContainerState, Exit, PodState};
use protobuf::Message as _;
use rustix::fs::FallocateFlags;

/// Now, in Unix nanoseconds.
pub(crate) fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Identity of this boot; empty if the kernel does not tell.
pub(crate) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Replaces the pod's record. The containers are left out: each has its own.
pub(crate) fn write_pod(paths: &PodPaths, state: &PodState) -> io::Result<()> {
    let state = PodState { containers: Vec::new(), ..state.clone() };
    replace(&paths.record(), &state.write_to_bytes().map_err(io::Error::other)?)
}

/// Replaces a container's record. The exit has a file of its own, so that recording it needs no space.
pub(crate) fn write_container(paths: &ContainerPaths, state: &ContainerState) -> io::Result<()> {
    replace(&paths.record(), &state.write_to_bytes().map_err(io::Error::other)?)
}

/// Makes the exit file and the room in it.
pub(crate) fn reserve_exit(paths: &ContainerPaths) -> io::Result<()> {
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(paths.exit())?;
    match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, EXIT_FILE_BYTES as u64) {
        // A filesystem without fallocate gets its blocks by the write below.
        Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
        Err(e) => return Err(e.into()),
    }
    file.write_all_at(&[0; EXIT_FILE_BYTES], 0)
}

/// Writes the exit into the room made for it, by one write.
pub(crate) fn write_exit(paths: &ContainerPaths, exit: &Exit) -> io::Result<()> {
    let bytes = encode_exit(exit)?;
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(paths.exit())?;
    file.write_all_at(&bytes, 0)
}

/// Brings files and the directory that names them to stable storage.
pub(crate) fn flush(dir: &Path, files: &[std::path::PathBuf]) -> io::Result<()> {
    for file in files {
        File::open(file)?.sync_all()?;
    }
    File::open(dir)?.sync_all()?;
    // The directory's own name, too.
    dir.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}

/// Writes a file that is not there yet, or replaces it. On a full disk it is written in place, if the room it has is
/// enough: the end of a pod must not need new space.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let written = write_file(&temporary, bytes, 0o600).and_then(|()| fs::rename(&temporary, path));
    let Err(why) = written else { return Ok(()) };
    let _ = fs::remove_file(&temporary);
    match why.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            overwrite(path, bytes).unwrap_or(Err(why))
        }
        _ => Err(why),
    }
}

/// Writes a file in place, by one write into blocks that it has; `None` if there are not enough. A crash of ours cannot
/// come between: the kernel copies what is less than a page without a pause.
fn overwrite(path: &Path, bytes: &[u8]) -> Option<io::Result<()>> {
    use std::os::unix::fs::MetadataExt as _;
    let file = OpenOptions::new().write(true).open(path).ok()?;
    let metadata = file.metadata().ok()?;
    let room = metadata.len().max(metadata.blocks() * 512);
    if bytes.len() as u64 > room {
        return None;
    }
    Some(file.write_all_at(bytes, 0).and_then(|()| file.set_len(bytes.len() as u64)))
}

/// Writes a file whole, with a mode that the umask does not change.
pub(crate) fn write_file(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    if mode != 0o600 {
        file.set_permissions(fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// Makes a directory for nobody but us, and what is missing above it.
pub(crate) fn make_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Removes a file; one that is not there is removed already.
pub(crate) fn remove_file(path: &Path) -> io::Result<()> {
    gone(fs::remove_file(path))
}

/// Removes a directory of ours and all in it. It follows no symbolic link; whoever calls has unmounted what was in it.
pub(crate) fn remove_dir(path: &Path) -> io::Result<()> {
    gone(fs::remove_dir_all(path))
}

/// Takes "was not there" for success.
pub(crate) fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ocid_api::id::{ContainerId, PodId};
    use ocid_api::paths::Dirs;
    use ocid_api::record::{read_container, read_pod};
    use ocid_api::shim::{ContainerPhase, PodPhase};

    #[test]
    fn what_is_written_is_read_back_with_its_exit() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = Dirs { root: dir.path().join("root"), state: dir.path().join("state") };
        let pod = dirs.pod(&PodId::generate());
        let id = ContainerId::generate();
        let container = pod.container(&id);
        make_dir(container.record_dir()).unwrap();
        let name = pod.record_dir().file_name().unwrap().to_str().unwrap().to_owned();
        let state = PodState { pod: name, phase: PodPhase::POD_READY.into(), ..Default::default() };
        write_pod(&pod, &state).unwrap();
        let running = ContainerState {
            container: id.to_string(),
            phase: ContainerPhase::CONTAINER_RUNNING.into(),
            pid: 7,
            ..Default::default()
        };
        write_container(&container, &running).unwrap();
        reserve_exit(&container).unwrap();
        assert_eq!(read_container(&pod, &id).unwrap(), Some(running));
        write_exit(&container, &Exit { code: 3, ..Default::default() }).unwrap();
        let read = read_pod(&pod).unwrap().unwrap();
        assert_eq!(read.phase.enum_value(), Ok(PodPhase::POD_READY));
        assert_eq!(read.containers[0].phase.enum_value(), Ok(ContainerPhase::CONTAINER_EXITED));
        assert_eq!((read.containers[0].exit.code, read.containers[0].pid), (3, 0));
    }

    #[test]
    fn the_exit_file_keeps_its_size() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = Dirs { root: dir.path().into(), state: dir.path().into() };
        let container = dirs.pod(&PodId::generate()).container(&ContainerId::generate());
        make_dir(container.record_dir()).unwrap();
        reserve_exit(&container).unwrap();
        write_exit(&container, &Exit { code: 1, ..Default::default() }).unwrap();
        assert_eq!(fs::metadata(container.exit()).unwrap().len(), EXIT_FILE_BYTES as u64);
    }

    #[test]
    fn an_emptied_record_is_an_error_and_hides_one_container_only() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = Dirs { root: dir.path().into(), state: dir.path().into() };
        let id = PodId::generate();
        let pod = dirs.pod(&id);
        let (good, bad) = (ContainerId::generate(), ContainerId::generate());
        for id in [&good, &bad] {
            make_dir(pod.container(id).record_dir()).unwrap();
            let state = ContainerState { container: id.to_string(), ..Default::default() };
            write_container(&pod.container(id), &state).unwrap();
        }
        write_pod(&pod, &PodState { pod: id.to_string(), ..Default::default() }).unwrap();
        fs::write(pod.container(&bad).record(), b"").unwrap();
        assert!(read_container(&pod, &bad).is_err());
        let containers = read_pod(&pod).unwrap().unwrap().containers;
        assert_eq!(containers.iter().map(|c| &*c.container).collect::<Vec<_>>(), [good.as_str()]);
        fs::write(pod.record(), b"").unwrap();
        assert!(read_pod(&pod).is_err());
    }

    #[test]
    fn a_record_is_written_in_place_only_into_room_that_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        assert!(overwrite(&path, b"new").is_none(), "there is no file");
        fs::write(&path, b"a longer one").unwrap();
        overwrite(&path, b"new").unwrap().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert!(overwrite(&path, &[0; 1 << 20]).is_none());
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }
}
