//! Images: pulled from a real registry and from bad ones, side-loaded, listed, removed.

use std::fs;
use std::time::{Duration, Instant};

use harness::client::{container, refused};
use harness::faults::{Fault, FaultyRegistry};
use harness::image::{Compression, Format, digest};
use harness::{BUSYBOX, Image, Layer, Node, Setup, registry, test};
use ocid_api::cri::AuthConfig;
use serde_json::json;
use tonic::Code;

const WITH_REGISTRY: Setup = Setup { busybox: true, cni: true, plugins: false, registry: true, start: true };

/// What a registry that cannot be used may be called; kubelet looks at the text's prefix.
const REGISTRY_CODES: [Code; 3] = [Code::Unknown, Code::Unavailable, Code::FailedPrecondition];

/// An image whose single extra file tells it from others.
fn marked(mark: &str) -> Image {
    Image::busybox().layer(Layer::new().file("mark", 0o644, format!("{mark}\n")))
}

fn content_files(node: &Node) -> usize {
    fs::read_dir(node.dirs().root.join("content/ingest")).map_or(0, Iterator::count)
}

#[test]
fn every_format_and_compression_is_pulled_and_runs() {
    test(WITH_REGISTRY, async |node| {
        let client = node.client();
        for (number, (format, compression, indexed)) in [
            (Format::Oci, Compression::Gzip, true),
            (Format::Oci, Compression::Zstd, false),
            (Format::Oci, Compression::Plain, true),
            (Format::Docker, Compression::Gzip, true),
            (Format::Docker, Compression::Gzip, false),
        ]
        .into_iter()
        .enumerate()
        {
            let layer = Layer::new().file("mark", 0o644, format!("{number}\n")).compressed(compression);
            let built = Image::busybox().layer(layer).format(format).indexed(indexed).build();
            node.registry().push(&built, "team/app", &format!("v{number}"));
            let name = format!("registry.test/team/app:v{number}");
            let reference =
                client.pull(&name).await.unwrap_or_else(|e| panic!("{format:?} {compression:?}: {e}"));
            let image = client.image(&name).await.unwrap().expect("it was pulled");
            assert_eq!((image.id.as_str(), reference.as_str()), (built.id.as_str(), built.id.as_str()));
            assert_eq!(image.repo_tags, std::slice::from_ref(&name));
            assert_eq!(image.repo_digests, [format!("registry.test/team/app@{}", built.digest)]);
            assert!(image.size > 0);

            let config = container("c", &built.id, &["cat", "/mark"]);
            let (pod, id) = node.run_with(&node.pod(&format!("p{number}")), &config).await;
            client.exited(&id).await;
            assert!(node.log(&id).await.ends_with(&format!("stdout F {number}\n")));
            client.remove_pod(&pod).await.unwrap();
        }
    });
}

#[test]
fn every_kind_of_name_finds_the_image() {
    test(WITH_REGISTRY, async |node| {
        let built = marked("names").build();
        node.registry().push(&built, "library/names", "latest");
        node.client().pull("names").await.unwrap();
        let digest = format!("docker.io/library/names@{}", built.digest);
        let hex = built.id.trim_start_matches("sha256:");
        for name in [
            "names",
            "names:latest",
            "docker.io/names",
            "docker.io/library/names:latest",
            digest.as_str(),
            built.id.as_str(),
            hex,
            &hex[..12],
        ] {
            let found = node.client().image(name).await.unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(found.unwrap_or_else(|| panic!("{name} finds nothing")).id, built.id);
        }
        for absent in ["absent", "docker.io/library/names:other", &"0".repeat(64)] {
            assert!(node.client().image(absent).await.unwrap().is_none(), "{absent}");
        }
        let by_digest = node.client().pull(&digest).await.unwrap();
        assert_eq!(by_digest, built.id);
    });
}

#[test]
fn one_image_under_many_names_is_one_image() {
    test(WITH_REGISTRY, async |node| {
        let client = node.client();
        let built = marked("tags").build();
        for tag in ["1", "2", "3"] {
            node.registry().push(&built, "tags", tag);
            client.pull(&format!("registry.test/tags:{tag}")).await.unwrap();
        }
        let images = client.images().await.unwrap();
        let found: Vec<_> = images.iter().filter(|i| i.id == built.id).collect();
        assert_eq!(found.len(), 1);
        let mut tags = found[0].repo_tags.clone();
        tags.sort();
        assert_eq!(tags, ["registry.test/tags:1", "registry.test/tags:2", "registry.test/tags:3"]);

        client.remove_image("registry.test/tags:2").await.unwrap();
        assert!(client.image(&built.id).await.unwrap().is_none(), "all names of an id go at once");
        client.remove_image("registry.test/tags:2").await.unwrap();
    });
}

#[test]
fn an_image_in_use_keeps_its_layers_when_its_name_goes() {
    test(WITH_REGISTRY, async |node| {
        let client = node.client();
        let built = marked("used").build();
        node.registry().push(&built, "used", "1");
        client.pull("registry.test/used:1").await.unwrap();
        let config = container("c", &built.id, &["sleep", "1000"]);
        let (pod, id) = node.run_with(&node.pod("u"), &config).await;
        client.remove_image(&built.id).await.unwrap();
        assert_eq!(client.shell(&id, "cat /mark").await, "used");
        node.restart().await;
        assert_eq!(client.shell(&id, "cat /mark; echo x > /y; cat /y").await, "used\nx");
        client.remove_pod(&pod).await.unwrap();
    });
}

#[test]
fn users_of_images_are_told() {
    test(WITH_REGISTRY, async |node| {
        for (user, uid, name) in
            [("1002", Some(1002), ""), ("1003:1004", Some(1003), ""), ("www-data", None, "www-data")]
        {
            let built = marked(user).config("User", json!(user)).build();
            node.registry().push(&built, "user", "1");
            node.client().pull("registry.test/user:1").await.unwrap();
            let image = node.client().image("registry.test/user:1").await.unwrap().unwrap();
            assert_eq!((image.uid.map(|u| u.value), image.username.as_str()), (uid, name), "{user}");
        }
    });
}

#[test]
fn configuration_of_the_image_is_used_where_the_container_has_none() {
    test(WITH_REGISTRY, async |node| {
        let built = Image::busybox()
            .config("Env", json!(["PATH=/bin", "FROM=image"]))
            .config("Entrypoint", json!(["sh", "-c"]))
            .config("Cmd", json!(["echo $FROM; pwd; id -u"]))
            .config("WorkingDir", json!("/var/spool"))
            .config("User", json!("nobody"))
            .build();
        node.registry().push(&built, "config", "1");
        node.client().pull("registry.test/config:1").await.unwrap();
        let (_, id) = node.run_with(&node.pod("c"), &container("c", "registry.test/config:1", &[])).await;
        node.client().exited(&id).await;
        let log = node.log(&id).await;
        let text: Vec<&str> = log.lines().filter_map(|l| l.splitn(4, ' ').nth(3)).collect();
        assert_eq!(text, ["image", "/var/spool", "65534"]);
    });
}

#[test]
fn identical_pulls_share_the_work() {
    test(Setup::default(), async |node| {
        let server = FaultyRegistry::start(Fault::None);
        let built = marked("shared").build();
        server.add(&built, "1");
        registry::mirror(&node.certs_dir(), "faulty.test", server.address);
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let client = node.client().clone();
            tasks.spawn(async move { client.pull("faulty.test/x:1").await.unwrap() });
        }
        assert!(tasks.join_all().await.iter().all(|id| *id == built.id));
        let requests = server.requests();
        for blob in built.blobs.keys() {
            let gets =
                requests.iter().filter(|r| r.starts_with("GET") && r.contains(&format!("/blobs/{blob}")));
            assert!(gets.count() <= 1, "{blob} was fetched more than once");
        }
    });
}

#[test]
fn bad_registries_are_told_apart_and_leave_nothing() {
    test(Setup::default(), async |node| {
        let server = FaultyRegistry::start(Fault::None);
        let built = marked("fault").build();
        server.add(&built, "1");
        registry::mirror(&node.certs_dir(), "faulty.test", server.address);
        let wrong = AuthConfig { username: "u".into(), password: "S3cret".into(), ..Default::default() };
        let denied = [Code::Unauthenticated, Code::PermissionDenied];
        for (fault, codes) in [
            (Fault::Status(404), &[Code::NotFound][..]),
            (Fault::Status(401), &denied),
            (Fault::Status(403), &denied),
            (Fault::Status(500), &REGISTRY_CODES),
            (Fault::Truncate, &REGISTRY_CODES),
            (Fault::WrongBlob, &REGISTRY_CODES),
            (Fault::Basic("u".into(), "right".into()), &denied),
            (Fault::Token("u".into(), "right".into()), &denied),
        ] {
            server.set(fault.clone());
            let begun = Instant::now();
            let result = node.client().pull_as("faulty.test/x:1", Some(wrong.clone())).await;
            assert!(result.is_err(), "{fault:?} was accepted");
            let said = refused(result, codes);
            assert!(said.contains("faulty.test"), "{fault:?}: {said:?} does not name the image");
            assert!(!said.contains("S3cret"), "{fault:?}: the password is in the error");
            assert!(begun.elapsed() < Duration::from_secs(60), "{fault:?} took {:?}", begun.elapsed());
            assert!(node.client().image("faulty.test/x:1").await.unwrap().is_none());
            assert_eq!(content_files(node), 0, "{fault:?} leaves a half-fetched blob");
        }
        // By digest, what is not what the digest says is refused.
        server.set(Fault::WrongManifest);
        let name = format!("faulty.test/x@{}", built.digest);
        refused(node.client().pull(&name).await, &REGISTRY_CODES);
        assert!(!fs::read_to_string(node.path().join("daemon.log")).unwrap().contains("S3cret"), "logged");

        // And the same daemon pulls it as soon as the registry is right.
        server.set(Fault::Unavailable(1));
        assert_eq!(node.client().pull("faulty.test/x:1").await.unwrap(), built.id);
    });
}

#[test]
fn credentials_are_used() {
    test(Setup::default(), async |node| {
        let server = FaultyRegistry::start(Fault::None);
        // By its own name: credentials for one host are not sent to another that is only its mirror.
        let host = server.address;
        let encoded = harness::faults::base64(b"u:right");
        let plain = AuthConfig { username: "u".into(), password: "right".into(), ..Default::default() };
        let joined = AuthConfig { auth: encoded, ..Default::default() };
        for (tag, fault, auth) in [
            ("a", Fault::Basic("u".into(), "right".into()), plain.clone()),
            ("b", Fault::Token("u".into(), "right".into()), plain),
            ("c", Fault::Basic("u".into(), "right".into()), joined),
        ] {
            server.add(&marked(tag).build(), tag);
            server.set(fault);
            node.client().pull_as(&format!("{host}/x:{tag}"), Some(auth)).await.unwrap();
        }
    });
}

#[test]
fn a_registry_that_hangs_holds_only_its_own_pull() {
    test(WITH_REGISTRY, async |node| {
        let server = FaultyRegistry::start(Fault::Hang);
        registry::mirror(&node.certs_dir(), "hang.test", server.address);
        let hasty = harness::Client::with_timeout(&node.socket(), Duration::from_secs(2));
        let hanging = tokio::spawn(async move { hasty.pull("hang.test/x:1").await });
        node.registry().push(&marked("ok").build(), "ok", "1");
        node.client().pull("registry.test/ok:1").await.unwrap();
        refused(hanging.await.unwrap(), &[Code::Cancelled, Code::DeadlineExceeded]);
    });
}

#[test]
fn bad_names_are_refused() {
    test(Setup::default(), async |node| {
        for name in ["", "x/UPPER", "../x", "a b", "x@sha256:short", "registry.test/x:", &"n".repeat(5000)] {
            refused(node.client().pull(name).await, &[Code::InvalidArgument]);
        }
    });
}

#[test]
fn an_image_that_lies_about_its_layers_is_refused() {
    test(WITH_REGISTRY, async |node| {
        let lie = vec![digest(b"nothing like it")];
        let built = Image::new().layer(Layer::new().file("x", 0o644, "x")).with_diff_ids(lie).build();
        node.registry().push(&built, "lie", "1");
        refused(
            node.client().pull("registry.test/lie:1").await,
            &[Code::FailedPrecondition, Code::Unknown, Code::InvalidArgument, Code::Unavailable],
        );
        assert!(node.client().image("registry.test/lie:1").await.unwrap().is_none());
    });
}

#[test]
fn archives_in_the_preload_directory_are_imported_at_start() {
    test(Setup { busybox: false, start: false, ..Setup::default() }, async |node| {
        let dir = node.preload_dir();
        let (oci, docker, layout) =
            (marked("oci"), marked("docker").format(Format::Docker), marked("layout"));
        oci.build().write_archive(&dir.join("oci.tar"), &["registry.test/oci:1", "registry.test/oci:2"]);
        docker.build().write_docker_save(&dir.join("docker.tar"), &["registry.test/docker:1"]);
        layout.build().write_layout(&dir.join("layout"), &["registry.test/layout:1"]);
        fs::write(dir.join("broken.tar"), b"this is no archive").unwrap();
        fs::write(dir.join("empty.tar"), b"").unwrap();
        node.start().await;
        harness::eventually(Duration::from_secs(30), "all are imported", async || {
            let images = node.client().images().await.map_err(|e| e.to_string())?;
            let mut names: Vec<String> = images.into_iter().flat_map(|i| i.repo_tags).collect();
            names.sort();
            let expected = ["docker:1", "layout:1", "oci:1", "oci:2"].map(|n| format!("registry.test/{n}"));
            if names == expected { Ok(()) } else { Err(format!("{names:?}")) }
        })
        .await;
        for mark in ["oci", "docker", "layout"] {
            let config = container("c", &format!("registry.test/{mark}:1"), &["cat", "/mark"]);
            let (_, id) = node.run_with(&node.pod(mark), &config).await;
            node.client().exited(&id).await;
            assert!(node.log(&id).await.ends_with(&format!("F {mark}\n")));
        }
        node.restart().await;
        assert_eq!(node.client().images().await.unwrap().len(), 3, "a second start imports nothing twice");
    });
}

#[test]
fn the_image_filesystem_is_measured() {
    test(WITH_REGISTRY, async |node| {
        let usage = node.client().image_fs().await.unwrap();
        let fs = &usage.image_filesystems[0];
        assert!(fs.timestamp > 0 && fs.used_bytes.unwrap().value > 0);
        assert!(node.path().starts_with(&fs.fs_id.as_ref().unwrap().mountpoint) || fs.fs_id.is_some());
        assert!(node.client().image(BUSYBOX).await.unwrap().unwrap().size > 1_000_000);
    });
}
