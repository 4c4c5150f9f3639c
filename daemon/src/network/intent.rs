//! What is to be attached, frozen before it is done.
//!
//! Pure. A [`Request`] is what a pod wants; an [`Intent`] adds the network as it is configured now. The intent is
//! recorded before the first plugin runs, and is all that CHECK and DEL need, whatever happens to the daemon, the node
//! or the configuration in between.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::conf::{List, Plugin, Version, valid_name};
use super::result::Dns;
use crate::error::{Error, Result};

/// The name of the pod's interface, inside the pod.
pub(super) const IFNAME: &str = "eth0";

/// The annotations that limit a pod's bandwidth, in bits per second.
const INGRESS_ANNOTATION: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS_ANNOTATION: &str = "kubernetes.io/egress-bandwidth";
/// What Kubernetes takes for a reasonable rate, in bits per second.
const RATE_MIN: u128 = 1_000;
const RATE_MAX: u128 = 1_000_000_000_000_000;
/// A bucket this deep never limits a burst, and is what plugins take.
const BURST_BITS: i32 = i32::MAX;

/// What a pod wants from its network.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// The pod's id; plugins know it as the container id.
    pub pod_id: String,
    /// The pod's namespace in Kubernetes.
    pub pod_namespace: String,
    /// The pod's name in Kubernetes.
    pub pod_name: String,
    /// The pod's uid in Kubernetes.
    pub pod_uid: String,
    /// Where its network namespace is (or will be) pinned.
    pub netns: PathBuf,
    /// Ports of the node that lead to the pod; those without a host port are left out.
    pub port_mappings: Vec<PortMapping>,
    /// The pod's own resolver settings, for networks that want to know them.
    pub dns: Dns,
    /// The pod's annotations; only the bandwidth limits are read.
    pub annotations: BTreeMap<String, String>,
    /// Ranges of this node's pods as `address/bits`, one per family, for networks that want to be told.
    pub pod_cidrs: Vec<String>,
    /// The pod's cgroup, for networks that want to know it.
    pub cgroup_path: Option<String>,
}

/// A port of the node that leads to one of the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortMapping {
    /// On the node; 0 is none.
    pub host_port: u16,
    /// In the pod.
    pub container_port: u16,
    /// Which ports are meant.
    pub protocol: Protocol,
    /// The node's address; all of them if None.
    pub host_ip: Option<IpAddr>,
}

/// A protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// One attachment, with everything that ADD, CHECK and DEL need.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct Intent {
    /// The network's configuration at the time of the request.
    list: Value,
    container_id: String,
    ifname: String,
    netns: PathBuf,
    args: String,
    capability_args: Map<String, Value>,
    plugin_dirs: Vec<PathBuf>,
}

impl Intent {
    pub(super) fn new(request: &Request, list: &List, plugin_dirs: &[PathBuf]) -> Result<Intent> {
        if !valid_name(&request.pod_id) {
            return Err(Error::invalid(format!(
                "pod id {:?} cannot name a network attachment",
                request.pod_id
            )));
        }
        if !request.netns.is_absolute() || request.netns.to_str().is_none() {
            return Err(Error::invalid(format!(
                "network namespace {:?} is not an absolute path",
                request.netns
            )));
        }
        Ok(Intent {
            list: list.source.clone(),
            container_id: request.pod_id.clone(),
            ifname: IFNAME.to_owned(),
            netns: request.netns.clone(),
            args: args(request)?,
            capability_args: capability_args(request, list.version)?,
            plugin_dirs: plugin_dirs.to_vec(),
        })
    }

    /// The network's name.
    #[must_use]
    pub fn network(&self) -> &str {
        self.list["name"].as_str().unwrap_or_default()
    }

    /// What plugins know the pod by.
    #[must_use]
    pub fn container_id(&self) -> &str {
        &self.container_id
    }

    /// The pod's interface.
    #[must_use]
    pub fn ifname(&self) -> &str {
        &self.ifname
    }

    /// The pod's network namespace.
    #[must_use]
    pub fn netns(&self) -> &Path {
        &self.netns
    }

    pub(super) fn args(&self) -> &str {
        &self.args
    }

    pub(super) fn plugin_dirs(&self) -> &[PathBuf] {
        &self.plugin_dirs
    }

    /// The frozen network.
    pub(super) fn list(&self) -> Result<List> {
        List::parse(self.list.clone()).map_err(|e| e.during("the recorded network configuration"))
    }

    /// The runtime arguments that this plugin declares it wants.
    pub(super) fn runtime_config(&self, plugin: &Plugin) -> Map<String, Value> {
        let wanted = self.capability_args.iter().filter(|(key, _)| plugin.capabilities.contains(*key));
        wanted.map(|(key, value)| (key.clone(), value.clone())).collect()
    }
}

impl fmt::Debug for Intent {
    /// Without the configuration, which may hold credentials.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Intent")
            .field("network", &self.network())
            .field("container_id", &self.container_id)
            .field("ifname", &self.ifname)
            .field("netns", &self.netns)
            .finish_non_exhaustive()
    }
}

/// `CNI_ARGS`. A value that could end its pair and begin another is refused.
fn args(request: &Request) -> Result<String> {
    let pairs = [
        ("K8S_POD_NAMESPACE", &request.pod_namespace),
        ("K8S_POD_NAME", &request.pod_name),
        ("K8S_POD_INFRA_CONTAINER_ID", &request.pod_id),
        ("K8S_POD_UID", &request.pod_uid),
    ];
    let mut args = "IgnoreUnknown=1".to_owned();
    for (key, value) in pairs {
        if value.contains([';', '=']) || value.chars().any(char::is_control) {
            return Err(Error::invalid(format!("{value:?} cannot be passed to network plugins as {key}")));
        }
        args.extend([";", key, "=", value]);
    }
    Ok(args)
}

/// What a plugin may ask for by naming it in its `capabilities`. Nothing is passed empty.
fn capability_args(request: &Request, version: Version) -> Result<Map<String, Value>> {
    let mut args = Map::new();
    let ports: Vec<_> =
        request.port_mappings.iter().filter(|mapping| mapping.host_port > 0).map(port).collect();
    if !ports.is_empty() {
        args.insert("portMappings".to_owned(), ports.into());
    }
    let Dns { servers, searches, options } = &request.dns;
    if request.dns != Dns::default() {
        args.insert(
            "dns".to_owned(),
            json!({ "servers": servers, "searches": searches, "options": options }),
        );
    }
    let mut bandwidth = Map::new();
    for (annotation, direction) in [(INGRESS_ANNOTATION, "ingress"), (EGRESS_ANNOTATION, "egress")] {
        if let Some(text) = request.annotations.get(annotation) {
            let rate = rate(text).map_err(|e| e.during(format!("annotation {annotation}")))?;
            bandwidth.insert(format!("{direction}Rate"), rate.into());
            bandwidth.insert(format!("{direction}Burst"), BURST_BITS.into());
        }
    }
    if !bandwidth.is_empty() {
        args.insert("bandwidth".to_owned(), bandwidth.into());
    }
    let ranges = request.pod_cidrs.iter().map(|cidr| range(cidr)).collect::<Result<Vec<_>>>()?;
    if !ranges.is_empty() {
        args.insert("ipRanges".to_owned(), ranges.into());
    }
    if let Some(path) = request.cgroup_path.as_ref().filter(|_| version >= Version::V1_1_0) {
        args.insert("cgroupPath".to_owned(), path.as_str().into());
    }
    Ok(args)
}

fn port(mapping: &PortMapping) -> Value {
    let protocol = match mapping.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    };
    let (host_port, container_port) = (mapping.host_port, mapping.container_port);
    let mut port = json!({ "hostPort": host_port, "containerPort": container_port, "protocol": protocol });
    if let Some(ip) = mapping.host_ip {
        port["hostIP"] = ip.to_string().into();
    }
    port
}

/// A set of ranges to take one address from.
pub(super) fn range(cidr: &str) -> Result<Value> {
    let bad = || Error::invalid(format!("{cidr:?} is not a range of addresses"));
    let (address, bits) = cidr.split_once('/').ok_or_else(bad)?;
    let (address, bits): (IpAddr, u8) =
        (address.parse().map_err(|_| bad())?, bits.parse().map_err(|_| bad())?);
    if bits > if address.is_ipv4() { 32 } else { 128 } {
        return Err(bad());
    }
    Ok(json!([{ "subnet": cidr }]))
}

fn rate(text: &str) -> Result<u64> {
    let bits = quantity(text).ok_or_else(|| Error::invalid(format!("{text:?} is not a quantity")))?;
    match u64::try_from(bits) {
        Ok(rate) if (RATE_MIN..=RATE_MAX).contains(&bits) => Ok(rate),
        _ => Err(Error::invalid(format!("{text:?} is not between 1k and 1P bits per second"))),
    }
}

/// A Kubernetes quantity (`10M`, `1.5Gi`, `2e6`, `500m`) as a whole number, rounded up. None if it is none, or is
/// negative; `u128::MAX` stands for all that is larger.
fn quantity(text: &str) -> Option<u128> {
    let text = text.strip_prefix('+').unwrap_or(text);
    let number = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(number);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = [whole, fraction].concat();
    if digits.is_empty() || digits.len() > 30 || fraction.contains('.') {
        return None;
    }
    let mantissa: u128 = digits.parse().ok()?;
    let (binary, decimal) = scale(suffix)?;
    let exponent = decimal - i32::try_from(fraction.len()).ok()?;
    let scaled = mantissa.checked_mul(1 << binary);
    let power = 10_u128.checked_pow(exponent.unsigned_abs());
    Some(match (scaled, power, exponent >= 0) {
        (Some(0), ..) => 0,
        (Some(scaled), Some(power), true) => scaled.saturating_mul(power),
        (Some(scaled), Some(power), false) => scaled.div_ceil(power),
        // Divided by more than it can be: something tiny, rounded up.
        (Some(_), None, false) => 1,
        _ => u128::MAX,
    })
}

/// A suffix as powers of two and of ten.
fn scale(suffix: &str) -> Option<(u32, i32)> {
    Some(match suffix {
        "" => (0, 0),
        "n" => (0, -9),
        "u" => (0, -6),
        "m" => (0, -3),
        "k" => (0, 3),
        "M" => (0, 6),
        "G" => (0, 9),
        "T" => (0, 12),
        "P" => (0, 15),
        "E" => (0, 18),
        "Ki" => (10, 0),
        "Mi" => (20, 0),
        "Gi" => (30, 0),
        "Ti" => (40, 0),
        "Pi" => (50, 0),
        "Ei" => (60, 0),
        _ => {
            let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            (0, exponent.clamp(-1_000, 1_000))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn list(version: &str) -> List {
        let all = json!({"portMappings": true, "dns": true, "bandwidth": false});
        let plugins = json!([{"type": "bridge"}, {"type": "portmap", "capabilities": all}]);
        List::parse(json!({"cniVersion": version, "name": "net", "plugins": plugins})).unwrap()
    }

    fn request() -> Request {
        Request {
            pod_id: "p1".to_owned(),
            pod_namespace: "default".to_owned(),
            pod_name: "web".to_owned(),
            pod_uid: "u1".to_owned(),
            netns: "/run/ns".into(),
            ..Request::default()
        }
    }

    fn annotated(key: &str, value: &str) -> Request {
        Request { annotations: BTreeMap::from([(key.to_owned(), value.to_owned())]), ..request() }
    }

    #[test]
    fn a_plain_pod_passes_no_capability_arguments() {
        let plain = Request { cgroup_path: Some("/kubepods/p1".to_owned()), ..request() };
        assert_eq!(Value::from(capability_args(&plain, Version::V1_0_0).unwrap()), json!({}));
        let cgroup = json!({"cgroupPath": "/kubepods/p1"});
        assert_eq!(
            Value::from(capability_args(&plain, Version::V1_1_0).unwrap()),
            cgroup,
            "known since 1.1.0"
        );
    }

    #[test]
    fn every_wish_becomes_its_capability_argument() {
        let mapping = |host_port, protocol, host_ip: Option<&str>| PortMapping {
            host_port,
            container_port: 80,
            protocol,
            host_ip: host_ip.map(|ip| ip.parse().unwrap()),
        };
        let request = Request {
            port_mappings: vec![
                mapping(8080, Protocol::Tcp, None),
                mapping(0, Protocol::Tcp, None),
                mapping(53, Protocol::Udp, Some("127.0.0.1")),
                mapping(7, Protocol::Sctp, Some("::1")),
            ],
            dns: Dns { servers: vec!["10.0.0.10".to_owned()], ..Dns::default() },
            pod_cidrs: vec!["10.1.0.0/24".to_owned(), "fd00::/64".to_owned()],
            ..annotated(INGRESS_ANNOTATION, "10M")
        };
        let expected = json!({
            "portMappings": [
                {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
                {"hostPort": 53, "containerPort": 80, "protocol": "udp", "hostIP": "127.0.0.1"},
                {"hostPort": 7, "containerPort": 80, "protocol": "sctp", "hostIP": "::1"},
            ],
            "dns": {"servers": ["10.0.0.10"], "searches": [], "options": []},
            "bandwidth": {"ingressRate": 10_000_000, "ingressBurst": 2_147_483_647},
            "ipRanges": [[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00::/64"}]],
        });
        assert_eq!(Value::from(capability_args(&request, Version::V1_0_0).unwrap()), expected);
        let egress = capability_args(&annotated(EGRESS_ANNOTATION, "1Mi"), Version::V1_0_0).unwrap();
        assert_eq!(egress["bandwidth"], json!({"egressRate": 1_048_576, "egressBurst": 2_147_483_647}));
    }

    #[test]
    fn a_plugin_gets_only_what_it_declares() {
        let list = list("1.0.0");
        let ports =
            vec![PortMapping { host_port: 1, container_port: 2, protocol: Protocol::Tcp, host_ip: None }];
        let request = Request { port_mappings: ports, ..annotated(INGRESS_ANNOTATION, "10M") };
        let intent = Intent::new(&request, &list, &[]).unwrap();
        assert!(intent.runtime_config(&list.plugins[0]).is_empty());
        let given: Vec<_> = intent.runtime_config(&list.plugins[1]).into_iter().map(|(key, _)| key).collect();
        assert_eq!(given, ["portMappings"]);
    }

    #[test]
    fn an_intent_survives_being_recorded_and_hides_the_configuration() {
        let intent = Intent::new(&request(), &list("1.0.0"), &["/opt/cni/bin".into()]).unwrap();
        let back: Intent = serde_json::from_str(&serde_json::to_string(&intent).unwrap()).unwrap();
        assert_eq!(back, intent);
        let expected = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=p1;K8S_POD_UID=u1";
        assert_eq!(back.args(), expected);
        assert!(!format!("{back:?}").contains("portmap"));
    }

    #[test]
    fn bad_requests_are_refused() {
        let bad = [
            Request { pod_name: "a;K8S_POD_UID=evil".to_owned(), ..request() },
            Request { pod_namespace: "a=b".to_owned(), ..request() },
            Request { pod_uid: "a\nb".to_owned(), ..request() },
            Request { pod_id: "../x".to_owned(), ..request() },
            Request { pod_id: String::new(), ..request() },
            Request { netns: "ns".into(), ..request() },
            Request { pod_cidrs: vec!["10.0.0.0".to_owned()], ..request() },
            Request { pod_cidrs: vec!["10.0.0.0/33".to_owned()], ..request() },
            annotated(INGRESS_ANNOTATION, "fast"),
            annotated(EGRESS_ANNOTATION, "999"),
            annotated(EGRESS_ANNOTATION, "2P"),
        ];
        for request in bad {
            let error = Intent::new(&request, &list("1.0.0"), &[]).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidArgument, "{error}");
        }
    }

    #[test]
    fn quantities_are_read_as_kubernetes_reads_them() {
        let good = [
            ("0", 0),
            ("12", 12),
            ("+12", 12),
            ("1.5k", 1_500),
            ("1.5Ki", 1_536),
            ("10M", 10_000_000),
            (".5G", 500_000_000),
            ("1.", 1),
            ("1E", 1_000_000_000_000_000_000),
            ("1E3", 1_000),
            ("1e-3", 1),
            ("2e6", 2_000_000),
            ("1500m", 2),
            ("1n", 1),
            ("0e999999999", 0),
            ("1e-999999999", 1),
            ("1e999999999", u128::MAX),
            ("999999999999999999999999999999Ei", u128::MAX),
        ];
        for (text, expected) in good {
            assert_eq!(quantity(text), Some(expected), "{text}");
        }
        for text in [
            "",
            ".",
            "-1",
            "1.2.3",
            "1 M",
            "1K",
            "M",
            "0x10",
            "1e",
            "1ee3",
            "١",
            "9999999999999999999999999999999",
        ] {
            assert_eq!(quantity(text), None, "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_quantity_panics(text in "[+-]?[0-9.]{0,40}([a-zA-Z]{0,2}|[eE][+-]?[0-9]{0,12})") {
            let _ = quantity(&text);
        }
    }
}
