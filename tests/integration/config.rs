//! The configuration file: what is wrong in it is said before anything is touched.

use std::fs;
use std::time::Duration;

use harness::{Setup, test};

#[test]
fn a_config_with_an_unknown_key_is_refused_by_name() {
    let unstarted = Setup { start: false, ..Setup::default() };
    test(unstarted, async |node| {
        for (text, word) in [
            ("[network]\nconf_dri = \"/x\"\n", "conf_dri"),
            ("[nonsense]\na = 1\n", "nonsense"),
            ("[network]\nconf_dir = 7\n", "conf_dir"),
            ("[network\n", "config"),
        ] {
            fs::write(node.config_file(), text).unwrap();
            let (status, said) = node.run_to_end(node.command());
            assert!(!status.success(), "accepted: {text}");
            assert!(said.contains(word), "{said:?} does not name {word}");
            assert!(!said.contains("panicked"), "{said}");
        }
        assert!(!node.socket().exists(), "it listened before it had read its configuration");
    });
}

#[test]
fn the_effective_config_can_be_printed_and_read_back() {
    test(Setup { start: false, ..Setup::default() }, async |node| {
        let print = || {
            let output = node.command().arg("config").output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        };
        let printed = print();
        assert!(printed.contains(&node.cgroup), "{printed}");
        assert!(printed.lines().filter(|line| line.starts_with('#')).count() > 5, "a comment on each field");
        fs::write(node.config_file(), &printed).unwrap();
        assert_eq!(print(), printed);
        fs::write(node.path().join("config.d/50.toml"), "[runtime]\ncgroup_parent = \"/other\"\n").unwrap();
        assert!(print().contains("/other"), "a drop-in changes it");
    });
}

#[test]
fn a_second_daemon_on_the_same_directories_is_refused() {
    test(Setup::default(), async |node| {
        let (status, said) = node.run_to_end(node.command());
        assert!(!status.success() && !said.is_empty());
        node.client().version().await.unwrap();
    });
}

#[test]
fn a_service_manager_passes_the_socket_and_is_told_when_it_is_served() {
    test(Setup { start: false, ..Setup::default() }, async |node| {
        let passed = node.path().join("passed.sock");
        let listener = std::os::unix::net::UnixListener::bind(&passed).unwrap();
        let told = node.path().join("notify.sock");
        let notified = std::os::unix::net::UnixDatagram::bind(&told).unwrap();
        notified.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let daemon = node.command();
        // The shell becomes the daemon, so that the pid it names is the daemon's.
        let mut command = std::process::Command::new("sh");
        command.args(["-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\" 3<&0 </dev/null", "sh"]);
        command.arg(daemon.get_program()).args(daemon.get_args());
        command.env("NOTIFY_SOCKET", &told).stdin(std::os::fd::OwnedFd::from(listener));
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        let mut child = command.spawn().unwrap();
        let hear = || {
            let mut said = [0; 256];
            let length = notified.recv(&mut said).unwrap();
            String::from_utf8_lossy(&said[..length]).into_owned()
        };
        assert!(hear().contains("READY=1"));
        harness::Client::with_timeout(&passed, Duration::from_secs(10)).version().await.unwrap();
        assert!(!node.socket().exists(), "it made a socket of its own beside the one it was given");
        harness::process::signal(child.id(), nix::sys::signal::Signal::SIGTERM);
        assert!(hear().contains("STOPPING=1"));
        assert!(child.wait().unwrap().success());
    });
}
