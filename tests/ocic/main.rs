//! A small CRI client for demonstrations and tests: what crictl does, as far as `scripts/run` needs it, on a machine
//! that has no crictl. It is a client like any other and knows nothing of the daemon but its socket.

#![allow(clippy::print_stdout, reason = "printing is what a command-line client does")]

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant, UNIX_EPOCH};

use clap::{Parser, Subcommand};
use harness::client::{self, Client};
use harness::image::Image;
use ocid_api::cri::{ContainerState, PodSandboxState};
use tonic::Status;

#[derive(Parser)]
#[command(name = "ocic", about = "A small client for a CRI runtime")]
struct Arguments {
    /// The runtime's socket.
    #[arg(long, global = true, default_value = "/run/ocid/ocid.sock")]
    socket: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Name and version of the runtime.
    Version {
        /// Wait until the runtime answers, for so many seconds at most.
        #[arg(long, default_value_t = 0)]
        wait: u64,
    },
    /// The runtime's conditions.
    Status,
    /// All pods.
    Pods,
    /// All containers.
    Ps,
    /// All images.
    Images,
    /// Pull an image.
    Pull { image: String },
    /// Remove an image.
    Rmi { image: String },
    /// Write an image made from the machine's busybox as an OCI archive; needs no runtime.
    Busybox { archive: PathBuf, name: String },
    /// Run a pod; prints its id.
    Runp {
        #[arg(long)]
        name: String,
        /// Where its containers' logs go.
        #[arg(long, default_value = "/var/log/pods")]
        log_dir: PathBuf,
        /// Use the host's network.
        #[arg(long)]
        host_network: bool,
    },
    /// Run a container, in a pod of its own unless one is given; prints the pod's id and the container's.
    Run {
        #[arg(long)]
        name: String,
        #[arg(long)]
        image: String,
        /// A pod that runs already.
        #[arg(long)]
        pod: Option<String>,
        /// Where a pod of its own keeps its containers' logs.
        #[arg(long, default_value = "/var/log/pods")]
        log_dir: PathBuf,
        /// The command; the image's own if none.
        #[arg(last = true)]
        command: Vec<String>,
    },
    /// Run a command in a container and end with its exit code.
    Exec {
        container: String,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// The log of a container.
    Logs { container: String },
    /// All about a container.
    Inspect { container: String },
    /// The process id of a container's init.
    Pid { container: String },
    /// Stop a container.
    Stop {
        container: String,
        /// Seconds until it is killed.
        #[arg(long, default_value_t = 10)]
        timeout: i64,
    },
    /// Remove a container.
    Rm { container: String },
    /// Stop a pod.
    Stopp { pod: String },
    /// Remove a pod.
    Rmp {
        #[arg(required_unless_present = "all")]
        pod: Option<String>,
        /// Stop and remove every pod.
        #[arg(long)]
        all: bool,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let client = Client::new(&arguments.socket);
    match run(&client, arguments.command).await {
        Ok(code) => code,
        Err(status) => {
            eprintln!("ocic: {:?}: {}", status.code(), status.message());
            ExitCode::FAILURE
        }
    }
}

async fn run(client: &Client, command: Command) -> Result<ExitCode, Status> {
    match command {
        Command::Version { wait } => version(client, Duration::from_secs(wait)).await?,
        Command::Status => status(client).await?,
        Command::Pods => pods(client).await?,
        Command::Ps => containers(client).await?,
        Command::Images => images(client).await?,
        Command::Pull { image } => println!("{}", client.pull(&image).await?),
        Command::Rmi { image } => client.remove_image(&image).await?,
        Command::Busybox { archive, name } => Image::busybox().build().write_archive(&archive, &[&name]),
        Command::Runp { name, log_dir, host_network } => {
            let mut config = client::pod(&name, &log_dir);
            if host_network {
                client::namespaces(&mut config).network = ocid_api::cri::NamespaceMode::Node.into();
                config.hostname.clear();
            }
            println!("{}", client.run_pod(&config).await?);
        }
        Command::Run { name, image, pod, log_dir, command } => {
            let words: Vec<&str> = command.iter().map(String::as_str).collect();
            run_container(client, &name, &image, pod, log_dir, &words).await?;
        }
        Command::Exec { container, command } => return exec(client, &container, &command).await,
        Command::Logs { container } => {
            let path = client.container_status(&container).await?.log_path;
            let text = std::fs::read(&path).map_err(|e| Status::unknown(format!("read {path:?}: {e}")))?;
            std::io::stdout().write_all(&text)?;
        }
        Command::Inspect { container } => inspect(client, &container).await?,
        Command::Pid { container } => println!("{}", client.pid(&container).await?),
        Command::Stop { container, timeout } => client.stop(&container, timeout).await?,
        Command::Rm { container } => client.remove(&container).await?,
        Command::Stopp { pod } => client.stop_pod(&pod).await?,
        Command::Rmp { pod: Some(pod), .. } => client.remove_pod(&pod).await?,
        Command::Rmp { pod: None, .. } => {
            client.remove_all(Duration::from_secs(60)).await.map_err(Status::unknown)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn version(client: &Client, wait: Duration) -> Result<(), Status> {
    let begun = Instant::now();
    let version = loop {
        match client.version().await {
            Err(_) if begun.elapsed() < wait => tokio::time::sleep(Duration::from_millis(20)).await,
            answer => break answer?,
        }
    };
    println!("{} {} (CRI {})", version.runtime_name, version.runtime_version, version.runtime_api_version);
    Ok(())
}

async fn status(client: &Client) -> Result<(), Status> {
    let status = client.status().await?;
    for condition in status.status.unwrap_or_default().conditions {
        let (reason, message) = (condition.reason, condition.message);
        println!("{:<16} {:<6} {reason} {message}", condition.r#type, condition.status);
    }
    for handler in status.runtime_handlers {
        println!("handler {:<8} {:?}", format!("{:?}", handler.name), handler.features.unwrap_or_default());
    }
    Ok(())
}

async fn pods(client: &Client) -> Result<(), Status> {
    println!("{:<14} {:<10} {:<9} {:<16} NAME", "POD", "AGE", "STATE", "ADDRESS");
    for pod in client.pods().await? {
        let network = client.pod_status(&pod.id).await?.network.unwrap_or_default();
        let state = if pod.state() == PodSandboxState::SandboxReady { "ready" } else { "notready" };
        let name = pod.metadata.unwrap_or_default().name;
        println!("{:<14} {:<10} {state:<9} {:<16} {name}", short(&pod.id), age(pod.created_at), network.ip);
    }
    Ok(())
}

async fn containers(client: &Client) -> Result<(), Status> {
    println!("{:<14} {:<10} {:<9} {:<14} {:<8} NAME", "CONTAINER", "AGE", "STATE", "POD", "PID");
    for container in client.containers().await? {
        let state = match container.state() {
            ContainerState::ContainerCreated => "created",
            ContainerState::ContainerRunning => "running",
            ContainerState::ContainerExited => "exited",
            ContainerState::ContainerUnknown => "unknown",
        };
        let pid = client.pid(&container.id).await.unwrap_or_default();
        let name = container.metadata.clone().unwrap_or_default().name;
        let (id, pod) = (short(&container.id), short(&container.pod_sandbox_id));
        println!("{id:<14} {:<10} {state:<9} {pod:<14} {pid:<8} {name}", age(container.created_at));
    }
    Ok(())
}

async fn images(client: &Client) -> Result<(), Status> {
    println!("{:<14} {:<12} NAMES", "IMAGE", "BYTES");
    for image in client.images().await? {
        println!("{:<14} {:<12} {}", short(&image.id), image.size, image.repo_tags.join(" "));
    }
    Ok(())
}

async fn run_container(
    client: &Client,
    name: &str,
    image: &str,
    pod: Option<String>,
    log_dir: PathBuf,
    command: &[&str],
) -> Result<(), Status> {
    let mut pod_config = client::pod(name, &log_dir);
    let pod = match pod {
        // CreateContainer wants the pod's configuration; what decides is what the daemon has recorded.
        Some(pod) => {
            let status = client.pod_status(&pod).await?;
            pod_config.metadata = status.metadata;
            status.id
        }
        None => client.run_pod(&pod_config).await?,
    };
    println!("{pod}");
    println!("{}", client.run(&pod, &client::container(name, image, command), &pod_config).await?);
    Ok(())
}

async fn exec(client: &Client, container: &str, command: &[String]) -> Result<ExitCode, Status> {
    let words: Vec<&str> = command.iter().map(String::as_str).collect();
    let answer = client.exec(container, &words).await?;
    std::io::stdout().write_all(&answer.stdout)?;
    std::io::stderr().write_all(&answer.stderr)?;
    Ok(u8::try_from(answer.exit_code).map_or(ExitCode::FAILURE, ExitCode::from))
}

async fn inspect(client: &Client, container: &str) -> Result<(), Status> {
    let answer = client.container_info(container).await?;
    println!("{:#?}", answer.status.unwrap_or_default());
    for (key, value) in answer.info {
        println!("{key}: {value}");
    }
    Ok(())
}

/// As much of an id as people read; an image's without its algorithm.
fn short(id: &str) -> &str {
    let hex = id.trim_start_matches("sha256:");
    hex.get(..13).unwrap_or(hex)
}

fn age(created_at_ns: i64) -> String {
    let created = Duration::from_nanos(u64::try_from(created_at_ns).unwrap_or_default());
    let seconds = UNIX_EPOCH.elapsed().unwrap_or_default().saturating_sub(created).as_secs();
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        _ => format!("{}h", seconds / 3600),
    }
}
