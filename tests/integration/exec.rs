//! ExecSync: output, exit code, time-out, and what it leaves behind.

use std::time::{Duration, Instant};

use harness::client::refused;
use harness::{Setup, process, test};
use tonic::Code;

#[test]
fn output_and_exit_code_come_back_apart() {
    test(Setup::default(), async |node| {
        let (_, id) = node.run("e", &["sleep", "1000"]).await;
        let answer = node.client().exec(&id, &["sh", "-c", "echo out; echo err >&2; exit 5"]).await.unwrap();
        assert_eq!(
            (&answer.stdout[..], &answer.stderr[..], answer.exit_code),
            (&b"out\n"[..], &b"err\n"[..], 5)
        );
        // Bytes are bytes.
        let answer = node.client().exec(&id, &["printf", "\\377\\000x"]).await.unwrap();
        assert_eq!(answer.stdout, b"\xff\0x");
    });
}

#[test]
fn an_exec_is_in_the_container() {
    test(Setup::default(), async |node| {
        let (_, id) = node.run("e", &["sleep", "1000"]).await;
        let client = node.client();
        assert_eq!(client.shell(&id, "cat /proc/1/comm").await, "sleep");
        assert_eq!(client.shell(&id, "id -u; pwd").await, "0\n/");
        for namespace in ["mnt", "pid", "net", "ipc", "uts"] {
            let link = client
                .shell(&id, &format!("readlink /proc/self/ns/{namespace}; readlink /proc/1/ns/{namespace}"))
                .await;
            let (own, init) = link.split_once('\n').unwrap();
            assert_eq!(own, init);
        }
        let cgroups = client
            .shell(
                &id,
                "cat /proc/self/cgroup > /tmp/a; cat /proc/1/cgroup > /tmp/b; cmp /tmp/a /tmp/b && echo same",
            )
            .await;
        assert_eq!(cgroups, "same");
    });
}

#[test]
fn a_time_out_kills_what_ran_and_says_so() {
    test(Setup::default(), async |node| {
        let (_, id) = node.run("e", &["sleep", "1000"]).await;
        let begun = Instant::now();
        let result = node.client().exec_for(&id, &["sh", "-c", "sleep 5555 & sleep 5555"], 1).await;
        refused(result, &[Code::DeadlineExceeded]);
        assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
        harness::eventually(Duration::from_secs(2), "the exec is gone", async || {
            let left: Vec<_> = process::all().into_iter().filter(|p| p.cmdline == "sleep 5555").collect();
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        })
        .await;
        assert_eq!(node.client().shell(&id, "echo alive").await, "alive");
    });
}

#[test]
fn a_descendant_that_keeps_the_pipe_open_does_not_hold_the_answer() {
    test(Setup::default(), async |node| {
        let (_, id) = node.run("e", &["sleep", "1000"]).await;
        let begun = Instant::now();
        assert_eq!(node.client().shell(&id, "sleep 60 & echo done").await, "done");
        assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    });
}

#[test]
fn much_output_is_cut_and_the_command_goes_on() {
    test(Setup::default(), async |node| {
        let (_, id) = node.run("e", &["sleep", "1000"]).await;
        let line = "dd if=/dev/zero bs=1M count=40 2>/dev/null | tr '\\0' x; touch /finished";
        let answer = node.client().exec(&id, &["sh", "-c", line]).await.unwrap();
        let bytes = answer.stdout.len();
        assert!((4 << 20..16 << 20).contains(&bytes), "{bytes} bytes: kubelet takes messages below 16 MiB");
        assert_eq!(node.client().shell(&id, "ls /finished").await, "/finished");
    });
}

#[test]
fn what_cannot_run_is_told_apart_from_what_fails() {
    test(Setup::default(), async |node| {
        let client = node.client();
        let (_, id) = node.run("e", &["sleep", "1000"]).await;
        refused(client.exec(&id, &[]).await, &[Code::InvalidArgument]);
        // No such program: an error that names it, or the shell's exit code for it.
        match client.exec(&id, &["/no/such/program"]).await {
            Ok(answer) => assert!([126, 127, 255].contains(&answer.exit_code), "{answer:?}"),
            Err(status) => assert!(status.message().contains("/no/such/program"), "{status:?}"),
        }
        client.stop(&id, 0).await.unwrap();
        refused(client.exec(&id, &["true"]).await, &[Code::FailedPrecondition, Code::NotFound]);
    });
}

#[test]
fn many_at_once_are_each_answered() {
    test(Setup::default(), async |node| {
        let (_, id) = node.run("e", &["sleep", "1000"]).await;
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..40 {
            let (client, id) = (node.client().clone(), id.clone());
            tasks.spawn(async move {
                let answer =
                    client.exec(&id, &["sh", "-c", &format!("echo {number}; exit {number}")]).await.unwrap();
                assert_eq!(answer.stdout, format!("{number}\n").as_bytes());
                assert_eq!(answer.exit_code, number);
            });
        }
        tasks.join_all().await;
        let zombies: Vec<_> = process::all()
            .into_iter()
            .filter(|p| p.state == 'Z' && p.parent == node.shim_pid(&node_pod(node)))
            .collect();
        assert!(zombies.is_empty(), "{zombies:?}");
    });
}

/// The id of the only pod of a node, from its records.
fn node_pod(node: &harness::Node) -> String {
    ocid_api::record::pods(node.dirs()).unwrap()[0].to_string()
}

#[test]
fn an_exec_whose_caller_left_is_ended() {
    test(Setup::default(), async |node| {
        let (_, id) = node.run("e", &["sleep", "1000"]).await;
        let hasty = harness::Client::with_timeout(&node.socket(), Duration::from_millis(700));
        assert!(hasty.exec(&id, &["sleep", "6666"]).await.is_err());
        drop(hasty);
        harness::eventually(Duration::from_secs(6), "the exec is gone", async || {
            let left: Vec<_> = process::all().into_iter().filter(|p| p.cmdline == "sleep 6666").collect();
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        })
        .await;
    });
}
