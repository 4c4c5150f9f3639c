//! Container logs: the CRI format, long lines, both streams, reopening.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use harness::client::container;
use harness::{BUSYBOX, Setup, test};

/// One line of a CRI log.
fn parse(line: &str) -> (&str, &str, &str, &str) {
    let mut fields = line.splitn(4, ' ');
    let mut next = || fields.next().unwrap_or_else(|| panic!("malformed log line {line:?}"));
    (next(), next(), next(), next())
}

#[test]
fn every_line_has_time_stream_and_tag() {
    test(Setup::default(), async |node| {
        let (_, id) = node.run("l", &["sh", "-c", "echo one; echo two >&2; echo; printf 'no newline'"]).await;
        let status = node.client().exited(&id).await;
        assert!(Path::new(&status.log_path).is_absolute());
        let log = node.log(&id).await;
        assert!(log.ends_with('\n'));
        let mut streams: BTreeMap<&str, Vec<(&str, &str)>> = BTreeMap::new();
        for line in log.lines() {
            let (time, stream, tag, text) = parse(line);
            assert!(time.len() >= 20 && time.as_bytes()[10] == b'T', "{time} is not RFC 3339");
            streams.entry(stream).or_default().push((tag, text));
        }
        assert_eq!(streams["stderr"], [("F", "two")]);
        let out = &streams["stdout"];
        assert_eq!(out[..2], [("F", "one"), ("F", "")]);
        assert_eq!(out[2].1, "no newline");
        assert_eq!(out.len(), 3);
    });
}

#[test]
fn long_lines_are_split_and_lose_nothing() {
    test(Setup::default(), async |node| {
        let script = "i=0; while [ $i -lt 5000 ]; do printf 0123456789; i=$((i+1)); done; echo; echo end";
        let (_, id) = node.run("l", &["sh", "-c", script]).await;
        node.client().exited(&id).await;
        let log = node.log(&id).await;
        let (mut whole, mut parts) = (String::new(), Vec::new());
        for (_, _, tag, text) in log.lines().map(parse) {
            whole += text;
            parts.push((tag.to_owned(), text.len()));
            if tag == "F" {
                whole.push('\n');
            }
        }
        assert_eq!(whole, "0123456789".repeat(5000) + "\nend\n");
        assert!(parts.len() > 2 && parts.iter().all(|(_, length)| *length <= 16 << 10), "{parts:?}");
        assert!(parts[..parts.len() - 2].iter().all(|(tag, _)| tag == "P"), "{parts:?}");
    });
}

#[test]
fn a_log_may_be_renamed_and_reopened_while_lines_come() {
    test(Setup::default(), async |node| {
        let script =
            "i=0; while [ $i -lt 3000 ]; do echo $i; i=$((i+1)); [ $((i % 50)) = 0 ] && sleep 0.02; done";
        let (_, id) = node.run("l", &["sh", "-c", script]).await;
        let path = node.client().container_status(&id).await.unwrap().log_path;
        for rotation in 0..5 {
            tokio::time::sleep(std::time::Duration::from_millis(150)).await;
            fs::rename(&path, format!("{path}.{rotation}")).unwrap();
            node.client().reopen_log(&id).await.unwrap();
            assert!(Path::new(&path).exists(), "reopening makes the file");
        }
        node.client().exited(&id).await;
        let mut text = String::new();
        for rotation in 0..5 {
            text += &fs::read_to_string(format!("{path}.{rotation}")).unwrap();
        }
        text += &fs::read_to_string(&path).unwrap();
        let numbers: Vec<usize> = text.lines().map(|line| parse(line).3.parse().unwrap()).collect();
        assert_eq!(numbers, (0..3000).collect::<Vec<_>>(), "a line is missing, doubled or out of order");
    });
}

#[test]
fn a_log_cannot_be_reopened_when_its_container_is_gone() {
    test(Setup::default(), async |node| {
        let (_, id) = node.run("l", &["echo", "x"]).await;
        let path = node.client().exited(&id).await.log_path;
        fs::rename(&path, format!("{path}.old")).unwrap();
        let result = node.client().reopen_log(&id).await;
        assert!(result.is_ok() || !Path::new(&path).exists(), "an error, and a file all the same");
    });
}

#[test]
fn a_log_stays_when_its_container_goes_and_none_is_made_where_none_is_asked() {
    test(Setup::default(), async |node| {
        let (_, id) = node.run("l", &["echo", "x"]).await;
        let path = node.client().exited(&id).await.log_path;
        node.client().remove(&id).await.unwrap();
        assert!(fs::read_to_string(path).unwrap().ends_with("stdout F x\n"));

        let mut silent = container("silent", BUSYBOX, &["echo", "x"]);
        silent.log_path.clear();
        let (_, id) = node.run_with(&node.pod("s"), &silent).await;
        assert_eq!(node.client().exited(&id).await.exit_code, 0);
    });
}

#[test]
fn an_old_line_survives_a_log_that_exists_already() {
    test(Setup::default(), async |node| {
        let pod = node.pod("again");
        let dir = Path::new(&pod.log_directory).join("main");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("0.log"), "old\n").unwrap();
        let (_, id) = node.run_with(&pod, &container("main", BUSYBOX, &["echo", "new"])).await;
        node.client().exited(&id).await;
        let log = node.log(&id).await;
        assert!(log.starts_with("old\n") && log.ends_with("F new\n"), "{log}");
    });
}
