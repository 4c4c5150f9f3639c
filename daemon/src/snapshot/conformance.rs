//! The contract of a snapshotter, as tests.
//!
//! Each function takes a store on an empty directory. They need no mount, and so no privilege.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use ocid_api::id::ContainerId;

use super::{ChainId, LAYERS_MAX, Overlay, Usage};
use crate::error::Kind;

const USAGE: Usage = Usage { bytes: 4096, inodes: 2 };

/// Chain ids of so many layers.
pub(super) fn chain(count: usize) -> Vec<ChainId> {
    let diff_ids: Vec<String> = (1..=count).map(|n| format!("sha256:{n:064x}")).collect();
    ChainId::chain(&diff_ids).unwrap()
}

/// Commits a layer with one file.
pub(super) fn commit(overlay: &Overlay, chain_id: &ChainId, file: &str, content: &str) {
    let stage = overlay.stage().unwrap();
    std::fs::write(stage.dir().join(file), content).unwrap();
    stage.commit(chain_id, USAGE).unwrap();
}

fn entries(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

fn with_store(test: fn(&Path, &Overlay)) {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("snapshots");
    test(&dir, &Overlay::open(&dir).unwrap());
}

#[test]
fn a_layer_appears_whole_and_keeps_its_usage() {
    with_store(|_, overlay| {
        let id = &chain(1)[0];
        let stage = overlay.stage().unwrap();
        std::fs::write(stage.dir().join("f"), "x").unwrap();
        assert!(!overlay.has(id));
        assert_eq!(overlay.usage(id).unwrap_err().kind(), Kind::NotFound);
        stage.commit(id, USAGE).unwrap();
        assert!(overlay.has(id));
        assert_eq!(overlay.layers().unwrap(), std::slice::from_ref(id));
        assert_eq!(overlay.usage(id).unwrap(), USAGE);
        assert_eq!(std::fs::read(overlay.layer_dir(id).join("f")).unwrap(), b"x");
    });
}

#[test]
fn the_first_of_two_equal_commits_stays() {
    with_store(|dir, overlay| {
        let id = &chain(1)[0];
        commit(overlay, id, "f", "first");
        commit(overlay, id, "f", "second");
        assert_eq!(std::fs::read(overlay.layer_dir(id).join("f")).unwrap(), b"first");
        assert_eq!(entries(&dir.join("tmp")), 0);
    });
}

#[test]
fn a_stage_that_is_dropped_leaves_nothing() {
    with_store(|dir, overlay| {
        let stage = overlay.stage().unwrap();
        std::fs::create_dir_all(stage.dir().join("a/b")).unwrap();
        std::fs::set_permissions(stage.dir().join("a"), PermissionsExt::from_mode(0o0)).unwrap();
        drop(stage);
        assert_eq!(entries(&dir.join("tmp")), 0);
        assert!(overlay.layers().unwrap().is_empty());
    });
}

#[test]
fn layers_are_removed_once_and_for_all() {
    with_store(|dir, overlay| {
        let ids = chain(2);
        commit(overlay, &ids[0], "f", "x");
        overlay.remove_layer(&ids[0]).unwrap();
        overlay.remove_layer(&ids[0]).unwrap();
        overlay.remove_layer(&ids[1]).unwrap();
        assert!(!overlay.has(&ids[0]) && overlay.layers().unwrap().is_empty());
        assert_eq!(entries(&dir.join("tmp")), 0);
    });
}

#[test]
fn preparing_and_removing_a_container_may_be_repeated() {
    with_store(|dir, overlay| {
        let ids = chain(2);
        commit(overlay, &ids[0], "a", "1");
        commit(overlay, &ids[1], "b", "2");
        std::fs::set_permissions(overlay.layer_dir(&ids[1]), PermissionsExt::from_mode(0o711)).unwrap();
        let container = ContainerId::generate();

        let rootfs = overlay.prepare(&container, &ids).unwrap();
        std::fs::write(rootfs.upper.join("written"), "x").unwrap();
        assert_eq!(overlay.prepare(&container, &ids).unwrap(), rootfs);
        assert!(rootfs.upper.join("written").exists());
        assert_eq!(rootfs.lower[1..], [overlay.layer_dir(&ids[1]), overlay.layer_dir(&ids[0])]);
        assert_eq!(rootfs.upper.metadata().unwrap().mode() & 0o7777, 0o711);
        assert_eq!(overlay.containers().unwrap(), std::slice::from_ref(&container));

        overlay.remove(&container).unwrap();
        overlay.remove(&container).unwrap();
        assert!(overlay.containers().unwrap().is_empty() && !rootfs.upper.exists());
        assert_eq!(entries(&dir.join("tmp")), 0);
        assert!(overlay.has(&ids[0]) && overlay.has(&ids[1]));
    });
}

#[test]
fn what_cannot_be_mounted_is_not_prepared() {
    with_store(|_, overlay| {
        let ids = chain(LAYERS_MAX + 1);
        let container = ContainerId::generate();
        assert_eq!(overlay.prepare(&container, &ids).unwrap_err().kind(), Kind::InvalidArgument);
        assert_eq!(overlay.prepare(&container, &ids[..1]).unwrap_err().kind(), Kind::NotFound);
        assert_eq!(overlay.view(&ids).unwrap_err().kind(), Kind::InvalidArgument);
        assert_eq!(overlay.view(&ids[..1]).unwrap_err().kind(), Kind::NotFound);
        assert!(overlay.containers().unwrap().is_empty());
    });
}

#[test]
fn what_a_container_writes_is_measured() {
    with_store(|_, overlay| {
        let container = ContainerId::generate();
        assert_eq!(overlay.container_usage(&container).unwrap_err().kind(), Kind::NotFound);
        let rootfs = overlay.prepare(&container, &[]).unwrap();
        std::fs::write(rootfs.upper.join("f"), vec![1; 50_000]).unwrap();
        let usage = overlay.container_usage(&container).unwrap();
        assert!(usage.bytes >= 50_000 && usage.inodes == 2, "{usage:?}");
        overlay.remove(&container).unwrap();
        assert_eq!(overlay.container_usage(&container).unwrap_err().kind(), Kind::NotFound);
    });
}

#[test]
fn opening_again_finds_everything_and_removes_what_was_unfinished() {
    with_store(|dir, overlay| {
        let ids = chain(1);
        commit(overlay, &ids[0], "f", "x");
        let container = ContainerId::generate();
        let rootfs = overlay.prepare(&container, &ids).unwrap();
        std::mem::forget(overlay.stage().unwrap()); // as if we had died
        assert_eq!(entries(&dir.join("tmp")), 1);

        let again = Overlay::open(dir).unwrap();
        assert_eq!(entries(&dir.join("tmp")), 0);
        assert_eq!(again.layers().unwrap(), ids);
        assert_eq!(again.containers().unwrap(), std::slice::from_ref(&container));
        assert_eq!(again.prepare(&container, &ids).unwrap(), rootfs);
    });
}

#[test]
fn a_damaged_usage_record_is_replaced_by_looking() {
    with_store(|_, overlay| {
        let id = &chain(1)[0];
        commit(overlay, id, "f", "x");
        std::fs::write(overlay.layer_dir(id).with_file_name("usage"), "").unwrap();
        assert_eq!(overlay.usage(id).unwrap().inodes, 2);
    });
}

#[test]
fn nobody_else_can_get_in() {
    with_store(|dir, overlay| {
        let ids = chain(1);
        commit(overlay, &ids[0], "f", "x");
        let rootfs = overlay.prepare(&ContainerId::generate(), &ids).unwrap();
        let stage = overlay.stage().unwrap();
        let layer = overlay.layer_dir(&ids[0]);
        for path in
            [dir, layer.parent().unwrap(), rootfs.upper.parent().unwrap(), stage.dir().parent().unwrap()]
        {
            assert_eq!(path.metadata().unwrap().mode() & 0o077, 0, "{}", path.display());
        }
        overlay.sync().unwrap();
    });
}
