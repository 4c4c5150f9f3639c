//! What a layer may contain, what a stack of layers adds up to, and what no layer may do.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use harness::client::{container, refused};
use harness::image::Compression;
use harness::{Image, Layer, Node, Setup, test};
use tonic::Code;

const WITH_REGISTRY: Setup = Setup { busybox: true, cni: true, plugins: false, registry: true, start: true };

/// Pulls an image and starts a sleeping container of it; returns the container's id.
async fn running(node: &Node, image: &Image, name: &str) -> String {
    node.registry().push(&image.build(), name, "1");
    let reference = format!("registry.test/{name}:1");
    node.client().pull(&reference).await.unwrap_or_else(|e| panic!("pull {name}: {e}"));
    node.run_with(&node.pod(name), &container("c", &reference, &["sleep", "1000"])).await.1
}

#[test]
fn upper_layers_hide_replace_and_keep() {
    test(WITH_REGISTRY, async |node| {
        let image = Image::busybox()
            .layer(
                Layer::new()
                    .dir("a/", 0o755)
                    .file("a/gone", 0o644, "1")
                    .file("a/kept", 0o644, "1")
                    .dir("opaque/", 0o755)
                    .file("opaque/old", 0o644, "1")
                    .dir("swap/", 0o755)
                    .file("swap/inside", 0o644, "1")
                    .file("becomes-dir", 0o644, "1"),
            )
            .layer(
                Layer::new()
                    .whiteout("a/gone")
                    .dir("opaque/", 0o755)
                    .file("opaque/new", 0o644, "2")
                    .opaque("opaque")
                    .file("swap", 0o644, "now a file")
                    .dir("becomes-dir/", 0o755)
                    .file("becomes-dir/x", 0o644, "2")
                    .whiteout("a/never-was-there"),
            )
            .layer(Layer::new())
            .layer(Layer::new().file("a/gone", 0o644, "back").compressed(Compression::Zstd));
        let id = running(node, &image, "stack").await;
        let client = node.client();
        assert_eq!(client.shell(&id, "cat /a/gone /a/kept").await, "back1");
        assert_eq!(client.shell(&id, "ls -A /opaque").await, "new");
        assert_eq!(client.shell(&id, "cat /swap /becomes-dir/x").await, "now a file2");
        assert_eq!(client.shell(&id, "find / -xdev -name '.wh.*'").await, "");
    });
}

#[test]
fn modes_owners_links_devices_and_odd_names_arrive() {
    test(WITH_REGISTRY, async |node| {
        let long = "deep/".repeat(60) + "leaf";
        let layer = Layer::new()
            .file("suid", 0o4755, "x")
            .owner(1000, 2000)
            .file("far", 0o640, "x")
            .owner(3_000_000_000, 5)
            .file("one", 0o644, "same")
            .hardlink("two", "one")
            .symlink("abs", "/one")
            .symlink("dangling", "/no/where")
            .char_device("null", 0o666, 1, 3)
            .fifo("pipe", 0o600)
            .file("attr", 0o644, "x")
            .xattr("user.note", "hello")
            .file(&long, 0o644, "long")
            .file("new\nline", 0o644, "x")
            .file(b"not\xffutf8", 0o644, "x")
            .file("-rf", 0o644, "x")
            .sparse("holes", 64 << 20, 32 << 20, "middle")
            .dir("sticky/", 0o1777)
            .padded(20_000);
        let id = running(node, &Image::busybox().layer(layer), "odd").await;
        let client = node.client();
        let stat = async |path: &str| client.shell(&id, &format!("stat -c '%a %u %g %h %F' {path}")).await;
        assert_eq!(stat("/suid").await, "4755 1000 2000 1 regular file");
        assert_eq!(stat("/far").await, "640 3000000000 5 1 regular file");
        assert_eq!(stat("/one").await, "644 0 0 2 regular file");
        assert_eq!(stat("/sticky").await, "1777 0 0 2 directory");
        assert_eq!(
            client.shell(&id, "cat /abs; readlink /dangling; echo x > /null; cat /null").await,
            "same/no/where"
        );
        assert_eq!(client.shell(&id, &format!("cat /{long}")).await, "long");
        assert_eq!(
            client
                .shell(&id, "for f in /new?line /not?utf8 /-rf; do [ -f \"$f\" ] && echo x; done | wc -l")
                .await,
            "3"
        );
        assert_eq!(
            client.shell(&id, "stat -c %s /holes; tail -c +33554433 /holes | head -c 6").await,
            "67108864\nmiddle"
        );
        let blocks: u64 = client.shell(&id, "stat -c %b /holes").await.parse().unwrap();
        assert!(blocks < 1024, "the holes were written out: {blocks} blocks");

        let root = format!("/proc/{}/root", client.pid(&id).await.unwrap());
        assert!(fs::symlink_metadata(format!("{root}/pipe")).unwrap().file_type().is_fifo());
        assert_eq!(fs::metadata(format!("{root}/null")).unwrap().rdev(), 0x103);
        let mut value = [0; 16];
        let length = rustix::fs::getxattr(format!("{root}/attr"), "user.note", &mut value).unwrap();
        assert_eq!(&value[..length], b"hello");
    });
}

#[test]
fn no_layer_reaches_out_of_its_image() {
    test(WITH_REGISTRY, async |node| {
        let canary = node.path().join("canary");
        fs::write(&canary, "alive").unwrap();
        let outside = canary.display().to_string();
        let up = "../".repeat(30);
        let attacks: [(&str, Layer); 9] = [
            ("dotdot", Layer::new().file(format!("{up}{}", &outside[1..]), 0o644, "dead")),
            ("absolute", Layer::new().file(&outside, 0o644, "dead")),
            (
                "symlink",
                Layer::new().symlink("out", node.path().to_str().unwrap()).file("out/canary", 0o644, "dead"),
            ),
            (
                "relative-symlink",
                Layer::new().symlink("out", format!("{up}{}", &node.path().to_str().unwrap()[1..])).file(
                    "out/canary",
                    0o644,
                    "dead",
                ),
            ),
            ("hardlink", Layer::new().hardlink("stolen", &outside).file("stolen", 0o644, "dead")),
            ("hardlink-up", Layer::new().hardlink("stolen", format!("{up}{}", &outside[1..]))),
            ("whiteout", Layer::new().symlink("out", node.path().to_str().unwrap()).whiteout("out/canary")),
            ("whiteout-up", Layer::new().file("x/.wh...", 0o644, "")),
            (
                "opaque",
                Layer::new().symlink("out", node.path().to_str().unwrap()).file(
                    "out/.wh..wh..opq",
                    0o644,
                    "",
                ),
            ),
        ];
        for (name, layer) in attacks {
            let image = Image::busybox().layer(layer);
            node.registry().push(&image.build(), name, "1");
            // Refused, or unpacked inside the image: both are right as long as nothing outside changes.
            match node.client().pull(&format!("registry.test/{name}:1")).await {
                Ok(_) => {}
                Err(status) => drop(refused::<()>(
                    Err(status),
                    &[Code::InvalidArgument, Code::FailedPrecondition, Code::PermissionDenied, Code::Unknown],
                )),
            }
            assert_eq!(fs::read_to_string(&canary).unwrap(), "alive", "{name}");
            assert_eq!(fs::metadata(&canary).unwrap().nlink(), 1, "{name} linked a file of the host");
            node.client().version().await.unwrap();
        }
    });
}

#[test]
fn links_of_an_image_do_not_redirect_mounts() {
    test(WITH_REGISTRY, async |node| {
        // No busybox file may be replaced: only what the runtime mounts over is turned into links.
        let victim = node.path().join("victim");
        fs::create_dir(&victim).unwrap();
        let target = victim.to_str().unwrap();
        let layer = Layer::new()
            .whiteout("dev")
            .symlink("proc", target)
            .symlink("sys", target)
            .symlink("dev", target);
        let image = Image::busybox().layer(layer);
        node.registry().push(&image.build(), "links", "1");
        node.client().pull("registry.test/links:1").await.unwrap();
        let pod_config = node.pod("links");
        let pod = node.client().run_pod(&pod_config).await.unwrap();
        let config = container("c", "registry.test/links:1", &["sh", "-c", "echo ok"]);
        if let Ok(id) = node.client().create(&pod, &config, &pod_config).await {
            let _ = node.client().start(&id).await;
        }
        assert_eq!(fs::read_dir(&victim).unwrap().count(), 0, "the runtime followed a link of the image");
    });
}

#[test]
fn an_image_of_200_layers_runs() {
    test(WITH_REGISTRY, async |node| {
        let mut image = Image::busybox();
        for number in 0..200 {
            image = image.layer(Layer::new().file(format!("n/{number}"), 0o644, "x"));
        }
        let id = running(node, &image, "many").await;
        assert_eq!(node.client().shell(&id, "ls /n | wc -l").await, "200");
    });
}

#[test]
fn a_file_below_a_file_does_not_end_the_daemon() {
    test(WITH_REGISTRY, async |node| {
        let nested = Layer::new().file("a", 0o644, "x").file("a/b", 0o644, "x");
        let image = Image::busybox().layer(nested);
        node.registry().push(&image.build(), "nested", "1");
        // A file below a file: refused or replaced, but the daemon lives.
        let _ = node.client().pull("registry.test/nested:1").await;
        node.client().version().await.unwrap();
    });
}
