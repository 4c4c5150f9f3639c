//! Measures what a pod costs in time, memory and CPU, and prints one Markdown table. `scripts/bench` builds and runs it.
//!
//! Three things are measured side by side, in turns, because a machine is never quiet: ocid, Debian's containerd over
//! its own CRI socket, and the bare tools both stand on: `runc` on the very bundle that ocid made, the CNI plugins of the
//! very configuration, `cat` on the same file system. Both runtimes are asked by the same client in this process, so
//! nobody's start of a client is counted.
//!
//! It judges the floor that the project has set itself, line by line, and never fails for a number: the table is for
//! people. It fails if anything it ran is left behind.

#![allow(clippy::unwrap_used, reason = "a measurement that cannot go on ends, and says where")]
#![allow(clippy::print_stdout, reason = "the table is the program's output")]
#![allow(clippy::cast_precision_loss, reason = "what is printed has three digits")]

mod bare;
mod big;
mod containerd;
mod cost;
mod logs;
mod phases;
mod report;
mod samples;
mod weight;

use std::path::PathBuf;

use clap::Parser;
use harness::{Setup, test};

#[derive(Parser, Debug, Clone)]
#[command(name = "bench", about = "Measures ocid beside containerd, runc and the CNI plugins")]
struct Arguments {
    /// Small counts: a look, not a verdict.
    #[arg(long)]
    quick: bool,
    /// Pods of each runtime.
    #[arg(long)]
    pods: Option<usize>,
    /// Where an unpacked containerd has its programs; none, and it is left out.
    #[arg(long)]
    containerd: Option<PathBuf>,
    /// A static program that waits for ever, for containerd's pause image.
    #[arg(long, requires = "containerd")]
    pause: Option<PathBuf>,
    /// Where the large image is kept from one run to the next.
    #[arg(long)]
    cache: PathBuf,
}

/// How much of everything.
#[derive(Debug, Clone, Copy)]
struct Counts {
    pods: usize,
    execs: usize,
    lists: usize,
    restarts: usize,
    idle_s: u64,
    log_bytes: u64,
    logs: usize,
    pulls: usize,
}

impl Counts {
    fn new(arguments: &Arguments) -> Counts {
        let counts = match arguments.quick {
            false => Counts {
                pods: 50,
                execs: 60,
                lists: 100,
                restarts: 5,
                idle_s: 20,
                log_bytes: 1 << 30,
                logs: 3,
                pulls: 3,
            },
            true => Counts {
                pods: 10,
                execs: 15,
                lists: 30,
                restarts: 2,
                idle_s: 10,
                log_bytes: 256 << 20,
                logs: 1,
                pulls: 1,
            },
        };
        Counts { pods: arguments.pods.unwrap_or(counts.pods), ..counts }
    }
}

fn main() {
    let arguments = Arguments::parse();
    let counts = Counts::new(&arguments);
    let setup = Setup { registry: true, start: false, ..Setup::default() };
    test(setup, async |node| {
        let report = phases::run(node, &arguments, counts).await;
        println!("{report}");
    });
}

/// Says on stderr what is going on.
fn progress(what: &str) {
    eprintln!("bench: {what}");
}
