//! The files of a pod that its containers see: /etc/resolv.conf, /etc/hostname, /etc/hosts.
//!
//! Every value has been checked for control bytes where it was parsed, so a line stays a line.

use std::fmt::Write as _;
use std::fs;

use ocid_api::shim::File;

use crate::spec::{PodSpec, Scope};

/// Longest host file that is copied, in bytes.
const HOST_FILE_BYTES_MAX: usize = 64 << 10;

/// The files of a pod.
pub(super) fn of(spec: &PodSpec) -> Vec<File> {
    let host_network = spec.namespaces.network == Scope::Node;
    let hostname =
        if host_network { host_file("/etc/hostname") } else { format!("{}\n", spec.hostname).into_bytes() };
    let hosts = if host_network { host_file("/etc/hosts") } else { hosts(&spec.hostname).into_bytes() };
    let file = |name: &str, content| File { name: name.into(), content, mode: 0o644, ..Default::default() };
    vec![file("resolv.conf", resolv_conf(spec)), file("hostname", hostname), file("hosts", hosts)]
}

/// What the pod asked for, verbatim; the host's where it asked for nothing.
fn resolv_conf(spec: &PodSpec) -> Vec<u8> {
    let Some(dns) = &spec.dns else { return host_file("/etc/resolv.conf") };
    let mut text = String::new();
    let mut line = |keyword: &str, values: &[String]| {
        if !values.is_empty() {
            writeln!(text, "{keyword} {}", values.join(" ")).expect("a String takes every write");
        }
    };
    line("search", &dns.searches);
    for server in &dns.servers {
        line("nameserver", std::slice::from_ref(server));
    }
    line("options", &dns.options);
    text.into_bytes()
}

/// The names every host has. kubelet mounts its own file over this one, with the pod's address.
fn hosts(hostname: &str) -> String {
    let own = if hostname.is_empty() { String::new() } else { format!(" {hostname}") };
    format!("127.0.0.1\tlocalhost{own}\n::1\tlocalhost ip6-localhost ip6-loopback\n")
}

/// A file of the host, empty if there is none.
fn host_file(path: &str) -> Vec<u8> {
    let mut content = fs::read(path).unwrap_or_default();
    content.truncate(HOST_FILE_BYTES_MAX);
    content
}
