//! The pod network of one node: a bridge, a subnet and reservations of its own, so that nodes run side by side.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where the real CNI plugins are on Debian.
pub const PLUGINS: &str = "/usr/lib/cni";

/// Lock files that say which subnet is taken, by whichever process.
const LOCKS: &str = "/run/ocid-test";

/// A subnet held until dropped, with its bridge.
#[derive(Debug)]
pub struct Network {
    /// Name of the CNI network; stands in the comments of the plugins' firewall rules.
    pub name: String,
    /// The bridge's interface.
    pub bridge: String,
    /// The first three numbers of the subnet's addresses, with the dot after them.
    pub prefix: String,
    /// The directory with the CNI configuration.
    pub conf_dir: PathBuf,
    /// host-local's reservations.
    pub reservations: PathBuf,
    _lock: File,
}

impl Network {
    /// Takes a free subnet and writes the configuration into `dir`.
    pub fn new(dir: &Path, hex: &str) -> Network {
        let (number, lock) = take_subnet();
        let network = Network {
            name: format!("ocid-test-{hex}"),
            bridge: format!("oc{hex}"),
            prefix: format!("10.231.{number}."),
            conf_dir: dir.join("net.d"),
            reservations: dir.join("ipam"),
            _lock: lock,
        };
        network.remove_stale_bridges();
        fs::create_dir_all(&network.conf_dir).unwrap();
        fs::write(network.conf_file(), network.conflist()).unwrap();
        network
    }

    /// The configuration's file.
    pub fn conf_file(&self) -> PathBuf {
        self.conf_dir.join("10-test.conflist")
    }

    /// The configuration's text.
    pub fn conflist(&self) -> String {
        let list = serde_json::json!({
            "cniVersion": "1.0.0",
            "name": self.name,
            "plugins": [
                {
                    "type": "bridge", "bridge": self.bridge, "isGateway": true, "ipMasq": true, "hairpinMode": true,
                    "ipam": {
                        "type": "host-local",
                        "dataDir": self.reservations,
                        "ranges": [[{ "subnet": format!("{}0/24", self.prefix) }]],
                        "routes": [{ "dst": "0.0.0.0/0" }],
                    },
                },
                { "type": "portmap", "capabilities": { "portMappings": true }, "snat": true },
            ],
        });
        serde_json::to_string_pretty(&list).unwrap()
    }

    /// The addresses that are reserved now.
    pub fn reserved(&self) -> Vec<String> {
        let names = fs::read_dir(self.reservations.join(&self.name)).into_iter().flatten();
        let names = names.filter_map(|e| e.ok()?.file_name().into_string().ok());
        names.filter(|name| name.starts_with(&self.prefix)).collect()
    }

    /// The interfaces that are plugged into the bridge.
    pub fn ports(&self) -> Vec<String> {
        let ports = fs::read_dir(format!("/sys/class/net/{}/brif", self.bridge)).into_iter().flatten();
        ports.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect()
    }

    /// The firewall rules of this network or of the given pods. Chains that the plugins keep for all networks stay.
    pub fn rules(&self, pods: &[String]) -> Vec<String> {
        let mut found = Vec::new();
        for command in ["iptables-save", "ip6tables-save"] {
            let Ok(output) = Command::new(command).stderr(Stdio::null()).output() else { continue };
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let ours = |line: &&str| {
                line.contains(&self.prefix)
                    || line.contains(&self.name)
                    || line.contains(&self.bridge)
                    || pods.iter().any(|pod| line.contains(pod.as_str()))
            };
            found.extend(text.lines().filter(ours).map(str::to_owned));
        }
        found
    }

    /// A run that was killed leaves its bridge, whose address would compete with ours.
    fn remove_stale_bridges(&self) {
        let subnet = format!("{}0/24", self.prefix);
        let Ok(output) = Command::new("ip").args(["-o", "-4", "addr", "show", "to", &subnet]).output() else {
            return;
        };
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        for name in
            text.lines().filter_map(|line| line.split_whitespace().nth(1)).filter(|n| n.starts_with("oc"))
        {
            quietly("ip", &["link", "delete", name]);
        }
    }

    /// Removes the bridge, which outlives its last pod by the plugin's design.
    pub fn remove_bridge(&self) {
        quietly("ip", &["link", "delete", &self.bridge]);
    }

    /// Removes what a failed test left in the firewall: this network's rules and the chains they jump to.
    pub fn remove_rules(&self) {
        let Ok(saved) = Command::new("iptables-save").args(["-t", "nat"]).stderr(Stdio::null()).output()
        else {
            return;
        };
        let saved = String::from_utf8_lossy(&saved.stdout).into_owned();
        let mut chains = Vec::new();
        for rule in saved
            .lines()
            .filter(|l| l.starts_with("-A ") && (l.contains(&self.name) || l.contains(&self.prefix)))
        {
            let words = words(rule);
            let jump = words.iter().position(|w| w == "-j").and_then(|at| words.get(at + 1));
            chains.extend(words.get(1).cloned().into_iter().chain(jump.cloned()));
            let mut args = vec!["-w", "-t", "nat", "-D"];
            args.extend(words[1..].iter().map(String::as_str));
            quietly("iptables", &args);
        }
        // Only chains named by a hash are one pod's; the plugins' common ones have plain names.
        let per_pod = |c: &&String| c.starts_with("CNI-") && c.len() > 20;
        for chain in chains.iter().filter(per_pod) {
            quietly("iptables", &["-w", "-t", "nat", "-F", chain]);
            quietly("iptables", &["-w", "-t", "nat", "-X", chain]);
        }
    }
}

fn quietly(program: &str, args: &[&str]) {
    let _ = Command::new(program).args(args).stdout(Stdio::null()).stderr(Stdio::null()).status();
}

/// Splits a rule of iptables-save, whose comments are quoted and escape their quotes.
fn words(rule: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted, mut escaped) = (Vec::new(), String::new(), false, false);
    for c in rule.chars() {
        match c {
            _ if escaped => {
                word.push(c);
                escaped = false;
            }
            '\\' => escaped = true,
            '"' => quoted = !quoted,
            ' ' if !quoted => words.push(std::mem::take(&mut word)),
            _ => word.push(c),
        }
    }
    words.push(word);
    words
}

fn take_subnet() -> (u8, File) {
    fs::create_dir_all(LOCKS).unwrap();
    for number in 0..=254_u8 {
        let lock = File::create(format!("{LOCKS}/subnet-{number}")).unwrap();
        match lock.try_lock() {
            Ok(()) => return (number, lock),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(e)) => panic!("lock a subnet: {e}"),
        }
    }
    panic!("every test subnet is taken")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_split_as_a_shell_would() {
        let rule = r#"-A POSTROUTING -m comment --comment "name: \"n\" id: \"x\"" -j CNI-1"#;
        let split = words(rule);
        assert_eq!(split[5], r#"name: "n" id: "x""#);
        assert_eq!(split.last().unwrap(), "CNI-1");
    }

    #[test]
    fn two_networks_never_share_a_subnet() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (Network::new(dir.path(), "a"), Network::new(dir.path(), "b"));
        assert_ne!(a.prefix, b.prefix);
        assert!(a.reserved().is_empty() && a.ports().is_empty());
    }
}
