//! What is measured, in order. Within each phase ocid and what it is compared with take turns.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use harness::client::{self, Client, container};
use harness::image::Image;
use harness::{BUSYBOX, Layer, Node};
use ocid_api::cri::security_profile::ProfileType;
use ocid_api::cri::{
    ContainerState, ListContainerStatsRequest, ListPodSandboxStatsRequest, PodSandboxConfig, PodSandboxState,
    SecurityProfile, StatusRequest,
};
use serde_json::json;
use tonic::Status;

use crate::bare::{Cni, Netns, Runc};
use crate::big::Big;
use crate::containerd::{Containerd, PAUSE};
use crate::cost::{cpu_s, memory};
use crate::logs::{Flow, Stage};
use crate::report::{Floor, Report, Row, version};
use crate::samples::Samples;
use crate::weight::Weight;
use crate::{Arguments, Counts, progress};

/// How long a restarted daemon may take.
const RESTART_DEADLINE: Duration = Duration::from_secs(60);

/// A runtime under test, as far as both are alike.
struct Peer {
    client: Client,
    /// Cgroup parent that its pods ask for.
    cgroup: Option<String>,
    prefix: &'static str,
    /// Pod and container of each pod that runs.
    pods: Vec<(String, String)>,
    run: Samples,
    create: Samples,
    start: Samples,
    exec: Samples,
    stop: Samples,
    remove: Samples,
    stop_pod: Samples,
    remove_pod: Samples,
}

impl Peer {
    fn new(client: Client, prefix: &'static str, cgroup: Option<String>) -> Peer {
        let none = Samples::default;
        Peer {
            client,
            cgroup,
            prefix,
            pods: Vec::new(),
            run: none(),
            create: none(),
            start: none(),
            exec: none(),
            stop: none(),
            remove: none(),
            stop_pod: none(),
            remove_pod: none(),
        }
    }

    fn config(&self, node: &Node, name: &str) -> PodSandboxConfig {
        let mut config = client::pod(&format!("{}-{name}", self.prefix), &node.log_dir());
        if let Some(cgroup) = &self.cgroup {
            config.linux.get_or_insert_default().cgroup_parent.clone_from(cgroup);
        }
        fs::create_dir_all(&config.log_directory).unwrap();
        config
    }

    async fn start_pod(&mut self, node: &Node, number: usize) {
        let pod = self.config(node, &number.to_string());
        let mut sleep = container("main", BUSYBOX, &["sleep", "100000"]);
        // As a careful cluster has it; it is a good part of what runc does.
        client::security(&mut sleep).seccomp = Some(SecurityProfile {
            profile_type: ProfileType::RuntimeDefault.into(),
            localhost_ref: String::new(),
        });
        let id = self.run.await_it(self.client.run_pod(&pod)).await.unwrap();
        let container = self.create.await_it(self.client.create(&id, &sleep, &pod)).await.unwrap();
        self.start.await_it(self.client.start(&container)).await.unwrap();
        self.pods.push((id, container));
    }

    async fn exec(&mut self, number: usize) {
        let (_, container) = &self.pods[number % self.pods.len()];
        let answer = self.exec.await_it(self.client.exec(container, &["true"])).await.unwrap();
        assert_eq!(answer.exit_code, 0);
    }

    async fn end_pod(&mut self) {
        let Some((pod, container)) = self.pods.pop() else { return };
        self.stop.await_it(self.client.stop(&container, 0)).await.unwrap();
        self.remove.await_it(self.client.remove(&container)).await.unwrap();
        self.stop_pod.await_it(self.client.stop_pod(&pod)).await.unwrap();
        self.remove_pod.await_it(self.client.remove_pod(&pod)).await.unwrap();
    }

    /// The whole start of a pod.
    fn total(&self) -> Samples {
        self.run.plus(&self.create).plus(&self.start)
    }
}

/// The bare tools' turns.
#[derive(Default)]
struct Bare {
    cni_add: Samples,
    cni_del: Samples,
    create: Samples,
    start: Samples,
    delete: Samples,
}

impl Bare {
    fn round(&mut self, cni: &Cni, runc: &Runc, number: usize) {
        let id = format!("bare-{number}");
        let netns = Netns::new();
        let result = self.cni_add.time(|| cni.add(&id, &netns));
        runc.bundle(&id);
        self.create.time(|| runc.create(&id));
        self.start.time(|| runc.start(&id));
        runc.kill(&id);
        self.delete.time(|| runc.delete(&id));
        self.cni_del.time(|| cni.del(&id, &netns, &result));
    }

    /// What a pod's start cannot do without.
    fn total(&self) -> Samples {
        self.cni_add.plus(&self.create).plus(&self.start)
    }
}

struct Bench<'a> {
    node: &'a Node,
    counts: Counts,
    ocid: Peer,
    other: Option<(Containerd, Peer)>,
    report: Report,
}

/// Measures everything.
pub(crate) async fn run(node: &Node, arguments: &Arguments, counts: Counts) -> Report {
    let weight = Weight::raise(node);
    let mut bench = Bench::set_up(node, arguments, counts).await;
    bench.empty();
    bench.starts().await;
    bench.memory();
    bench.execs().await;
    bench.lists().await;
    bench.restarts().await;
    bench.idle().await;
    bench.ends().await;
    bench.logs().await;
    bench.pulls(&arguments.cache).await;
    if let Some((mut containerd, _)) = bench.other.take() {
        progress("ending containerd");
        containerd.finish().await;
    }
    drop(weight);
    bench.report
}

impl Bench<'_> {
    async fn set_up<'a>(node: &'a Node, arguments: &Arguments, counts: Counts) -> Bench<'a> {
        progress("starting the daemons");
        node.start().await;
        let ocid = Peer::new(node.client().clone(), "o", None);
        eventually_image(&ocid.client).await;
        let mut versions = vec![version("runc")];
        let mut other = None;
        if let Some(bin) = &arguments.containerd {
            node.registry().push(harness::node::busybox(), "busybox", "1");
            let pause = arguments.pause.as_deref().expect("--containerd needs --pause");
            let layer = Layer::new().file("pause", 0o755, fs::read(pause).unwrap());
            let pause = Image::new().layer(layer).config("Entrypoint", json!(["/pause"])).build();
            node.registry().push(&pause, "pause", "1");
            let mut containerd = Containerd::new(node, bin.clone());
            versions.push(format!("containerd {}", containerd.version()));
            containerd.start().await;
            let client = containerd.client().clone();
            for image in [BUSYBOX, PAUSE] {
                client.pull(image).await.unwrap();
            }
            other = Some((containerd, Peer::new(client, "c", Some(node.cgroup.clone()))));
        }
        let mut report = Report::new(&versions);
        let Counts { pods, execs, restarts, logs, pulls, log_bytes, .. } = counts;
        report.note(format!(
            "{pods} pods of each runtime, one container each; {execs} execs, {restarts} restarts, {logs} logs of {} MiB, \
             {pulls} pulls. Times in ms: p50 / p95 (least). Verdicts compare p50.",
            log_bytes >> 20
        ));
        Bench { node, counts, ocid, other, report }
    }

    fn ocid_helpers(&self) -> Vec<u32> {
        let mut pids: Vec<u32> = self.ocid.pods.iter().map(|(pod, _)| self.node.shim_pid(pod)).collect();
        // A pod that shares its process ids has a second process of ours.
        let pauses = harness::process::all().into_iter().filter(|p| pids.contains(&p.parent));
        let pauses: Vec<u32> = pauses.filter(|p| p.cmdline.contains("ocid-shim")).map(|p| p.pid).collect();
        pids.extend(pauses);
        pids
    }

    fn ocid_all(&self) -> Vec<u32> {
        let mut pids = self.ocid_helpers();
        pids.push(self.node.daemon_pid());
        pids
    }

    fn other_all(&self) -> Vec<u32> {
        self.other.as_ref().map_or_else(Vec::new, |(containerd, _)| {
            let mut pids = containerd.helpers();
            pids.push(containerd.pid());
            pids
        })
    }

    /// The daemons before their first pod.
    fn empty(&mut self) {
        let kib = |pid| memory(&[pid]);
        let ocid = kib(self.node.daemon_pid());
        let other = self.other.as_ref().map(|(containerd, _)| kib(containerd.pid()));
        self.report.row(Row {
            what: "daemon, no pods: PSS, private (MiB)".into(),
            ocid: mib(ocid.pss, ocid.private),
            containerd: other.map_or_else(dash, |memory| mib(memory.pss, memory.private)),
            ..Row::default()
        });
    }

    async fn starts(&mut self) {
        progress("starting pods");
        let (node, cni) = (self.node, Cni::new(self.node));
        let mut bare = Bare::default();
        // The first of each is warmed up on, and is the pattern for the bare runs.
        self.ocid.start_pod(node, 0).await;
        if let Some((_, peer)) = &mut self.other {
            peer.start_pod(node, 0).await;
            (peer.run, peer.create, peer.start) = Default::default();
        }
        (self.ocid.run, self.ocid.create, self.ocid.start) = Default::default();
        let runc = Runc::new(node, &bundle(node, &self.ocid.pods[0]));
        for number in 1..self.counts.pods {
            // Nobody always comes after the same one: the kernel is still busy with what that one left.
            for turn in number..number + 3 {
                match (turn % 3, &mut self.other) {
                    (0, _) => self.ocid.start_pod(node, number).await,
                    (1, _) => bare.round(&cni, &runc, number),
                    (_, Some((_, peer))) => peer.start_pod(node, number).await,
                    (_, None) => {}
                }
            }
        }
        let none = Peer::new(self.ocid.client.clone(), "", None);
        let other = self.other.as_ref().map_or(&none, |(_, peer)| peer);
        let row = |what: &str, ocid: &Samples, other: &Samples, bare: String| Row {
            what: what.into(),
            ocid: ocid.ms(),
            containerd: other.ms(),
            bare,
            floors: Vec::new(),
        };
        let report = &mut self.report;
        report.row(row(
            "RunPodSandbox",
            &self.ocid.run,
            &other.run,
            format!("CNI ADD {}", bare.cni_add.ms()),
        ));
        report.row(row(
            "CreateContainer",
            &self.ocid.create,
            &other.create,
            format!("runc create {}", bare.create.ms()),
        ));
        report.row(row(
            "StartContainer",
            &self.ocid.start,
            &other.start,
            format!("runc start {}", bare.start.ms()),
        ));
        let (total, least) = (self.ocid.total().p50(), bare.total().p50());
        let mut sum = row("pod start, the three", &self.ocid.total(), &other.total(), bare.total().ms());
        sum.floors.push(Floor::at_most("at most 1.15 of bare", total, least.map(|least| least * 1.15)));
        let half = other.total().p50().map(|other| other / 2.0);
        sum.floors.push(Floor::at_most("at most 0.5 of containerd", total, half));
        report.row(sum);
        report.row(row(
            "(bare runc delete; CNI DEL)",
            &Samples::default(),
            &Samples::default(),
            format!("{}; {}", bare.delete.ms(), bare.cni_del.ms()),
        ));
    }

    fn memory(&mut self) {
        let per_pod = |pids: &[u32], pods: usize| {
            let sum = memory(pids);
            (sum.pss as f64 / pods as f64, sum.private as f64 / pods as f64)
        };
        let pods = self.ocid.pods.len();
        let (pss, private) = per_pod(&self.ocid_helpers(), pods);
        let other = self.other.as_ref().map(|(containerd, _)| per_pod(&containerd.helpers(), pods));
        let text = |(pss, private): (f64, f64)| format!("{pss:.0}, {private:.0}");
        self.report.row(Row {
            what: format!("per pod of {pods}: PSS, private (KiB)"),
            ocid: text((pss, private)),
            containerd: other.map_or_else(dash, text),
            floors: vec![Floor::at_most("PSS at most 350", Some(pss), Some(350.0))],
            ..Row::default()
        });
        let ocid = memory(&[self.node.daemon_pid()]);
        let other = self.other.as_ref().map(|(containerd, _)| memory(&[containerd.pid()]));
        self.report.row(Row {
            what: format!("daemon, {pods} pods: PSS, private (MiB)"),
            ocid: mib(ocid.pss, ocid.private),
            containerd: other.map_or_else(dash, |memory| mib(memory.pss, memory.private)),
            floors: vec![Floor::at_most("PSS at most 20", Some(ocid.pss as f64 / 1024.0), Some(20.0))],
            ..Row::default()
        });
    }

    async fn execs(&mut self) {
        progress("exec");
        let runc = Runc::new(self.node, &bundle(self.node, &self.ocid.pods[0]));
        let mut bare = Samples::default();
        runc.bundle("bare-exec");
        runc.create("bare-exec");
        runc.start("bare-exec");
        for number in 0..self.counts.execs {
            for turn in number..number + 3 {
                match (turn % 3, &mut self.other) {
                    (0, _) => self.ocid.exec(number).await,
                    (1, _) => bare.time(|| runc.exec("bare-exec")),
                    (_, Some((_, peer))) => peer.exec(number).await,
                    (_, None) => {}
                }
            }
        }
        runc.kill("bare-exec");
        runc.delete("bare-exec");
        let limit = bare.p50().map(|bare| bare + 0.003);
        self.report.row(Row {
            what: "ExecSync(true)".into(),
            ocid: self.ocid.exec.ms(),
            containerd: self.other.as_ref().map_or_else(dash, |(_, peer)| peer.exec.ms()),
            bare: format!("runc exec {}", bare.ms()),
            floors: vec![Floor::at_most("at most bare + 3 ms", self.ocid.exec.p50(), limit)],
        });
    }

    async fn lists(&mut self) {
        progress("lists");
        let mut clients = vec![self.ocid.client.clone()];
        clients.extend(self.other.as_ref().map(|(_, peer)| peer.client.clone()));
        for call in LISTS {
            let mut samples = [Samples::default(), Samples::default()];
            let mut failed: [Option<Status>; 2] = [None, None];
            for _ in 0..self.counts.lists {
                for (at, client) in clients.iter().enumerate() {
                    if failed[at].is_none() {
                        failed[at] = samples[at].await_it(list(client, call)).await.err();
                    }
                }
            }
            let text = |at: usize| match &failed[at] {
                Some(status) => format!("{:?}", status.code()),
                None => samples[at].ms(),
            };
            self.report.row(Row {
                what: format!("{call}, {} pods", self.ocid.pods.len()),
                ocid: text(0),
                containerd: text(1),
                ..Row::default()
            });
        }
    }

    async fn restarts(&mut self) {
        progress("restarts");
        let (mut version, mut list) = (Samples::default(), Samples::default());
        let (mut other_version, mut other_list) = (Samples::default(), Samples::default());
        let pods = self.ocid.pods.len();
        for _ in 0..self.counts.restarts {
            self.node.kill();
            let begun = Instant::now();
            self.node.spawn();
            let (answered, listed) = back(&self.node.socket(), pods, begun).await;
            version.push(answered);
            list.push(listed);
            if let Some((containerd, _)) = &mut self.other {
                containerd.kill();
                let begun = Instant::now();
                containerd.spawn();
                let (answered, listed) = back(&containerd.socket(), pods, begun).await;
                other_version.push(answered);
                other_list.push(listed);
            }
        }
        self.report.row(Row {
            what: "kill -9, start: first Version".into(),
            ocid: version.ms(),
            containerd: other_version.ms(),
            ..Row::default()
        });
        self.report.row(Row {
            what: format!("kill -9, start: first List with all {pods}"),
            ocid: list.ms(),
            containerd: other_list.ms(),
            floors: vec![Floor::at_most("at most 200 ms", list.p50(), Some(0.2))],
            ..Row::default()
        });
    }

    async fn idle(&mut self) {
        let seconds = self.counts.idle_s;
        progress(&format!("{seconds} s of idling"));
        // What a start and many calls have left to do is no idling.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let (ocid, other) = (self.ocid_all(), self.other_all());
        let before = (cpu_s(&ocid), cpu_s(&other));
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        let used = (cpu_s(&ocid) - before.0, cpu_s(&other) - before.1);
        let in_20 = |used: f64| used * 20.0 / seconds as f64;
        self.report.row(Row {
            what: format!("CPU in 20 s of idling, {} pods (s)", self.ocid.pods.len()),
            ocid: format!("{:.3}", in_20(used.0)),
            containerd: self.other.as_ref().map_or_else(dash, |_| format!("{:.3}", in_20(used.1))),
            floors: vec![Floor::at_most("below 0.05", Some(in_20(used.0)), Some(0.05))],
            ..Row::default()
        });
    }

    async fn ends(&mut self) {
        progress("stopping pods");
        for _ in 0..self.ocid.pods.len() {
            self.ocid.end_pod().await;
            if let Some((_, peer)) = &mut self.other {
                peer.end_pod().await;
            }
        }
        let none = Peer::new(self.ocid.client.clone(), "", None);
        let other = self.other.as_ref().map_or(&none, |(_, peer)| peer);
        let ocid = &self.ocid;
        let stop = Floor::at_most("at most 15 ms", ocid.stop.p50(), Some(0.015));
        for (what, ocid, other, floors) in [
            ("StopContainer(0)", &ocid.stop, &other.stop, vec![stop]),
            ("RemoveContainer", &ocid.remove, &other.remove, vec![]),
            ("StopPodSandbox", &ocid.stop_pod, &other.stop_pod, vec![]),
            ("RemovePodSandbox", &ocid.remove_pod, &other.remove_pod, vec![]),
        ] {
            let (what, ocid, containerd) = (what.into(), ocid.ms(), other.ms());
            self.report.row(Row { what, ocid, containerd, floors, ..Row::default() });
        }
    }

    async fn logs(&mut self) {
        progress("logs");
        let node = self.node;
        let stage = Stage::new(node, self.counts.log_bytes);
        let (mut cat, mut alive, mut dead, mut other) =
            (Flows::default(), Flows::default(), Flows::default(), Flows::default());
        for round in 0..self.counts.logs {
            cat.push(stage.cat(node));
            for (kill, flows) in [(false, &mut alive), (true, &mut dead)] {
                let pod = self.ocid.config(node, &format!("log-{round}-{kill}"));
                let writer = stage.writer(&self.ocid.client, &pod, 1).await;
                let mut between = vec![node.shim_pid(&writer.pod)];
                match kill {
                    true => node.kill(),
                    false => between.push(node.daemon_pid()),
                }
                flows.push(writer.write(&between).await);
                if kill {
                    node.start().await;
                }
                remove_pod(&self.ocid.client, &writer.pod).await;
            }
            if let Some((containerd, peer)) = &self.other {
                let pod = peer.config(node, &format!("log-{round}"));
                // It takes minutes for as much.
                let writer = stage.writer(&peer.client, &pod, 8).await;
                let mut between = containerd.helpers();
                between.push(containerd.pid());
                other.push(writer.write(&between).await);
                remove_pod(&peer.client, &writer.pod).await;
            }
        }
        let mut other_dead = None;
        if let Some((containerd, peer)) = &mut self.other {
            let pod = peer.config(node, "log-dead");
            let writer = stage.writer(&peer.client, &pod, 8).await;
            containerd.kill();
            other_dead = Some(writer.write_for(Duration::from_secs(3)).await);
            containerd.start().await;
            remove_pod(&peer.client, &writer.pod).await;
        }
        let half = cat.speed.p50().map(|speed| speed / 2.0);
        for (what, flows, other) in [
            ("100-byte lines: MB/s, CPU s/GB", &alive, other.text()),
            (
                "the same, daemon dead",
                &dead,
                other_dead.map_or_else(dash, |speed| format!("{speed:.1} MB/s for 3 s, then blocked")),
            ),
        ] {
            self.report.row(Row {
                what: what.into(),
                ocid: flows.text(),
                containerd: other,
                bare: format!("cat {}", cat.text()),
                floors: vec![
                    Floor::at_least("at least 0.5 of cat", flows.speed.p50(), half),
                    Floor::at_most("at most 2 CPU s/GB", flows.cpu.p50(), Some(2.0)),
                ],
            });
        }
    }

    async fn pulls(&mut self, cache: &Path) {
        let big = Big::new(cache);
        progress("pulls");
        let (mut ocid, mut other) = (Flows::default(), Flows::default());
        let (packed, unpacked) = big.bytes();
        for round in 0..self.counts.pulls {
            let image = big.variant(&format!("{round}"));
            self.node.registry().push(&image, "big", &round.to_string());
            drop(image);
            let name = format!("registry.test/big:{round}");
            let mut turns = vec![(&mut ocid, self.ocid.client.clone(), vec![self.node.daemon_pid()])];
            if let Some((containerd, peer)) = &self.other {
                turns.push((&mut other, peer.client.clone(), vec![containerd.pid()]));
            }
            if round % 2 == 1 {
                turns.reverse();
            }
            for (flows, client, pids) in turns {
                // Else one runtime waits for the other's writes.
                rustix::fs::sync();
                let before = cpu_s(&pids);
                let begun = Instant::now();
                client.pull(&name).await.unwrap();
                flows.speed.push(begun.elapsed());
                flows.cpu.push_value(cpu_s(&pids) - before);
            }
        }
        let text = |flows: &Flows| match (flows.speed.p50(), flows.speed.percentile(0), flows.cpu.p50()) {
            (Some(p50), Some(least), Some(cpu)) => format!("{p50:.2} ({least:.2}), {cpu:.2}"),
            _ => dash(),
        };
        let limit = other.speed.p50().map(|other| other * 0.7);
        self.report.row(Row {
            what: format!(
                "pull of 7 gzip layers, {} MB, {} MB unpacked: s (least), CPU s of the daemon",
                packed / 1_000_000,
                unpacked / 1_000_000
            ),
            ocid: text(&ocid),
            containerd: text(&other),
            floors: vec![Floor::at_most("at most 0.7 of containerd", ocid.speed.p50(), limit)],
            ..Row::default()
        });
    }
}

/// Several flows, and what is said of them.
#[derive(Default)]
struct Flows {
    speed: Samples,
    cpu: Samples,
}

impl Flows {
    fn push(&mut self, flow: Flow) {
        self.speed.push_value(flow.mb_per_s);
        self.cpu.push_value(flow.cpu_s_per_gb);
    }

    fn text(&self) -> String {
        match (self.speed.p50(), self.cpu.p50()) {
            (Some(speed), Some(cpu)) => format!("{speed:.0}, {cpu:.2}"),
            _ => dash(),
        }
    }
}

/// The calls of [`list`].
const LISTS: [&str; 6] =
    ["Version", "Status", "ListPodSandbox", "ListContainers", "ListContainerStats", "ListPodSandboxStats"];

async fn list(client: &Client, call: &str) -> Result<(), Status> {
    match call {
        "Version" => client.version().await.map(drop),
        "Status" => client.runtime().status(StatusRequest { verbose: false }).await.map(drop),
        "ListPodSandbox" => client.pods().await.map(drop),
        "ListContainers" => client.containers().await.map(drop),
        "ListContainerStats" => {
            client.runtime().list_container_stats(ListContainerStatsRequest::default()).await.map(drop)
        }
        _ => client.runtime().list_pod_sandbox_stats(ListPodSandboxStatsRequest::default()).await.map(drop),
    }
}

/// Waits for a daemon that was just started: until it answers, and until it lists every pod ready and every container
/// running.
async fn back(socket: &Path, pods: usize, begun: Instant) -> (Duration, Duration) {
    let mut answered = None;
    loop {
        assert!(begun.elapsed() < RESTART_DEADLINE, "{} is not back", socket.display());
        tokio::time::sleep(Duration::from_millis(1)).await;
        // Asked for first, because a client that was refused once may pause before it tries again.
        if UnixStream::connect(socket).is_err() {
            continue;
        }
        let client = Client::new(socket);
        while client.version().await.is_ok() {
            let answered = *answered.get_or_insert_with(|| begun.elapsed());
            if all_listed(&client, pods).await {
                return (answered, begun.elapsed());
            }
            assert!(begun.elapsed() < RESTART_DEADLINE, "{} does not list all pods", socket.display());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

async fn all_listed(client: &Client, pods: usize) -> bool {
    let (Ok(listed), Ok(containers)) = (client.pods().await, client.containers().await) else { return false };
    let ready = listed.iter().filter(|pod| pod.state() == PodSandboxState::SandboxReady).count();
    let running = containers.iter().filter(|c| c.state() == ContainerState::ContainerRunning).count();
    ready == pods && running == pods
}

/// Removes a pod, more than once if need be: a containerd that was killed refuses the first stop now and then.
async fn remove_pod(client: &Client, pod: &str) {
    harness::eventually(Duration::from_secs(60), "the pod is removed", async || {
        client.stop_pod(pod).await.map_err(|e| e.to_string())?;
        client.remove_pod(pod).await.map_err(|e| e.to_string())
    })
    .await;
}

/// Waits until the daemon has imported the image that the harness laid down for it.
async fn eventually_image(client: &Client) {
    harness::eventually(Duration::from_secs(30), "the image is imported", async || {
        client.image(BUSYBOX).await.map_err(|e| e.to_string())?.map(drop).ok_or_else(|| "not yet".to_owned())
    })
    .await;
}

fn bundle(node: &Node, (pod, container): &(String, String)) -> PathBuf {
    let id = container.parse().expect("the daemon gives well-formed ids");
    node.pod_paths(pod).container(&id).bundle().to_owned()
}

fn mib(pss_kib: u64, private_kib: u64) -> String {
    format!("{:.1}, {:.1}", pss_kib as f64 / 1024.0, private_kib as f64 / 1024.0)
}

fn dash() -> String {
    "-".to_owned()
}
