//! Flags, configuration, logging; then the daemon runs until it is told to stop.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use ocid::config::{Config, Overrides};
use ocid::daemon::Daemon;
use ocid::error::{Context, Kind, Result};
use tracing_subscriber::EnvFilter;

/// Threads that drive requests. Each waits for others nearly always; what computes has threads of its own.
const WORKERS: usize = 2;

/// A Kubernetes container runtime: serves CRI; pods outlive it.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file; drop-ins are read from `config.d` beside it.
    #[arg(long, global = true)]
    config: Option<PathBuf>,
    /// Durable directory: images, snapshots, pod records.
    #[arg(long, global = true)]
    root: Option<PathBuf>,
    /// Directory of what has meaning only until a reboot.
    #[arg(long, global = true)]
    state: Option<PathBuf>,
    /// The CRI socket.
    #[arg(long, global = true)]
    listen: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Verb>,
}

#[derive(Subcommand)]
enum Verb {
    /// Print the configuration in effect, with a comment on each setting.
    Config,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            use std::io::Write;
            // Where even this fails there is nobody to tell.
            writeln!(std::io::stderr(), "ocid: {error}").ok();
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    let overrides = Overrides { root: arguments.root, state: arguments.state, listen: arguments.listen };
    let config = Config::load(arguments.config.as_deref(), overrides)?;
    match arguments.command {
        Some(Verb::Config) => {
            use std::io::Write;
            let text = config.document()?;
            std::io::stdout().write_all(text.as_bytes()).context(Kind::Internal, || "print".into())
        }
        None => {
            let filter = std::env::var("RUST_LOG").unwrap_or_else(|_| config.node.log.clone());
            let filter = EnvFilter::try_new(&filter)
                .context(Kind::InvalidArgument, || format!("node.log: {filter:?} is no filter"))?;
            tracing_subscriber::fmt()
                .with_env_filter(filter)
                .with_writer(std::io::stderr)
                .with_ansi(std::io::stderr().is_terminal())
                .with_target(false)
                .init();
            begin_clean();
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(WORKERS)
                .enable_all()
                .build()
                .context(Kind::Internal, || "start the runtime".into())?;
            let served = runtime.block_on(async { Daemon::build(config).await?.run().await });
            // Blocking work may hang on a dead file system; it does not hold the exit up.
            runtime.shutdown_background();
            served
        }
    }
}

/// Sheds what a careless parent may have left us with: what we make must not be everybody's to write, nor closed to
/// those it is for; and each pod takes a descriptor.
fn begin_clean() {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let mut files = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    files.current = files.maximum;
    if let Err(error) = rustix::process::setrlimit(rustix::process::Resource::Nofile, files) {
        tracing::warn!(%error, "the limit of open files stays low");
    }
}
