//! CNI results across specification versions.
//!
//! Pure. A result is kept as the JSON the plugin printed, since the next plugin and a later DEL want it back whole;
//! only `cniVersion` and what that version demands are set. We read addresses and DNS, and nothing else.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::conf::Version;
use super::plugin::excerpt;
use crate::error::{Error, Result};

/// Resolver settings, of a pod or of a network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    /// Addresses of name servers, the preferred one first.
    pub servers: Vec<String>,
    /// Search domains, the preferred one first.
    pub searches: Vec<String>,
    /// Resolver options, as in resolv.conf.
    pub options: Vec<String>,
}

/// What attaching gave. Kept by the caller, who hands it to CHECK and DEL.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attachment {
    /// The last plugin's result, as printed.
    pub result: Value,
    /// The pod's addresses, primary first.
    pub ips: Vec<IpAddr>,
    /// The network's resolver settings, for pods that bring none.
    #[serde(default)]
    pub dns: Dns,
}

#[derive(Deserialize)]
struct Shape {
    #[serde(default, deserialize_with = "null_is_default")]
    interfaces: Vec<Interface>,
    #[serde(default, deserialize_with = "null_is_default")]
    ips: Vec<Ip>,
    #[serde(default, deserialize_with = "null_is_default")]
    dns: RawDns,
}

#[derive(Deserialize)]
struct Interface {
    #[serde(default)]
    name: String,
    #[serde(default)]
    sandbox: String,
}

#[derive(Deserialize)]
struct Ip {
    address: String,
    interface: Option<i64>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawDns {
    #[serde(deserialize_with = "null_is_default")]
    nameservers: Vec<String>,
    domain: String,
    #[serde(deserialize_with = "null_is_default")]
    search: Vec<String>,
    #[serde(deserialize_with = "null_is_default")]
    options: Vec<String>,
}

/// Go prints an absent slice as null.
fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Decodes what a plugin printed after ADD, in the version of the list: ready to be the next one's `prevResult`.
pub(super) fn decode(stdout: &[u8], version: Version) -> Result<Value> {
    if stdout.trim_ascii().is_empty() {
        return Err(Error::internal("printed no result"));
    }
    let mut result: Map<String, Value> = serde_json::from_slice(stdout)
        .map_err(|e| Error::internal(format!("printed no CNI result: {e}: {}", excerpt(stdout))))?;
    if result.contains_key("ip4") || result.contains_key("ip6") {
        return Err(Error::internal("printed a result of CNI 0.2.0 or older, which is not supported"));
    }
    match result.get("cniVersion").map(|given| given.as_str().map(Version::parse)) {
        // Some plugins that pass a result on leave the version out.
        None | Some(Some(Ok(_))) => {}
        Some(Some(Err(error))) => return Err(error.during("printed a result of another version")),
        Some(None) => return Err(Error::internal("printed a result whose cniVersion is not a string")),
    }
    result.insert("cniVersion".to_owned(), version.to_string().into());
    if version < Version::V1_0_0 {
        name_families(&mut result);
    }
    let result = Value::Object(result);
    shape(&result)?;
    Ok(result)
}

/// Before 1.0.0 each address says its family; a plugin that answers in a newer version leaves it out.
fn name_families(result: &mut Map<String, Value>) {
    let Some(Value::Array(ips)) = result.get_mut("ips") else { return };
    for ip in ips.iter_mut().filter_map(Value::as_object_mut) {
        if !ip.contains_key("version") {
            let six = ip.get("address").and_then(Value::as_str).is_some_and(|address| address.contains(':'));
            ip.insert("version".to_owned(), if six { "6" } else { "4" }.into());
        }
    }
}

/// What the pod got from the last result of the chain.
pub(super) fn attachment(result: Value, ifname: &str) -> Result<Attachment> {
    let Shape { interfaces, ips, dns } = shape(&result)?;
    let mut ranked = Vec::with_capacity(ips.len());
    for ip in &ips {
        ranked.push((rank(ip, &interfaces, ifname), address(&ip.address)?));
    }
    // Stable: within a rank the plugin's order stands.
    ranked.sort_by_key(|(rank, _)| *rank);
    let mut ips: Vec<IpAddr> = Vec::with_capacity(ranked.len());
    for (_, ip) in ranked {
        if !ips.contains(&ip) {
            ips.push(ip);
        }
    }
    if ips.is_empty() {
        return Err(Error::internal("the network gave the pod no address"));
    }
    let searches =
        if dns.search.is_empty() && !dns.domain.is_empty() { vec![dns.domain] } else { dns.search };
    Ok(Attachment { result, ips, dns: Dns { servers: dns.nameservers, searches, options: dns.options } })
}

fn shape(result: &Value) -> Result<Shape> {
    Shape::deserialize(result).map_err(|e| Error::internal(format!("printed a malformed CNI result: {e}")))
}

/// The pod's own interface first, then others inside it, then addresses without an interface, then the host's.
fn rank(ip: &Ip, interfaces: &[Interface], ifname: &str) -> u8 {
    let interface =
        ip.interface.and_then(|index| usize::try_from(index).ok()).and_then(|index| interfaces.get(index));
    match interface {
        Some(interface) if !interface.sandbox.is_empty() && interface.name == ifname => 0,
        Some(interface) if !interface.sandbox.is_empty() => 1,
        None => 2,
        Some(_) => 3,
    }
}

fn address(text: &str) -> Result<IpAddr> {
    let (address, prefix) =
        text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
    let bad =
        || Error::internal(format!("printed a result with the bad address {:?}", excerpt(text.as_bytes())));
    let ip: IpAddr = address.parse().map_err(|_| bad())?;
    let bits_max = if ip.is_ipv4() { 32 } else { 128 };
    match prefix.map(str::parse::<u8>) {
        None => Ok(ip),
        Some(Ok(bits)) if bits <= bits_max => Ok(ip),
        Some(_) => Err(bad()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn attach(version: &str, result: &Value) -> Result<Attachment> {
        let version = Version::parse(version).unwrap();
        attachment(decode(result.to_string().as_bytes(), version)?, "eth0")
    }

    fn ips(attachment: &Attachment) -> Vec<String> {
        attachment.ips.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn results_of_every_version_give_the_pods_addresses_in_order() {
        let interfaces = json!([
            {"name": "br0"}, {"name": "veth1"}, {"name": "net1", "sandbox": "/ns"}, {"name": "eth0", "sandbox": "/ns"}
        ]);
        let cases = [
            ("0.3.0", json!({"version": "4", "address": "10.0.0.2/24", "interface": 3})),
            ("0.3.1", json!({"version": "4", "address": "10.0.0.2/24", "interface": 3})),
            (
                "0.4.0",
                json!({"version": "4", "address": "10.0.0.2/24", "interface": 3, "gateway": "10.0.0.1"}),
            ),
            ("1.0.0", json!({"address": "10.0.0.2/24", "interface": 3})),
            ("1.1.0", json!({"address": "10.0.0.2/24", "interface": 3})),
        ];
        for (version, ip) in cases {
            let result = json!({"cniVersion": version, "interfaces": interfaces, "routes": [{"dst": "0.0.0.0/0"}], "ips": [
                {"version": "4", "address": "192.168.0.1/32", "interface": 0},
                {"version": "4", "address": "10.9.9.9/24"},
                {"version": "4", "address": "10.1.0.2/24", "interface": 2},
                ip,
                {"version": "6", "address": "fd00::2/64", "interface": 3},
            ]});
            let attachment = attach(version, &result).unwrap();
            assert_eq!(
                ips(&attachment),
                ["10.0.0.2", "fd00::2", "10.1.0.2", "10.9.9.9", "192.168.0.1"],
                "{version}"
            );
            assert_eq!(attachment.result, result, "{version}: kept as printed");
        }
    }

    #[test]
    fn the_next_plugin_gets_the_lists_version() {
        let newer = json!({"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.2/24"}, {"address": "fd00::2/64"}], "x": [1]});
        let result = decode(newer.to_string().as_bytes(), Version::parse("0.4.0").unwrap()).unwrap();
        let expected = json!({"cniVersion": "0.4.0", "x": [1],
            "ips": [{"address": "10.0.0.2/24", "version": "4"}, {"address": "fd00::2/64", "version": "6"}]});
        assert_eq!(result, expected);
        let unversioned = decode(br#"{"ips": null}"#, Version::parse("1.0.0").unwrap()).unwrap();
        assert_eq!(unversioned, json!({"cniVersion": "1.0.0", "ips": null}));
    }

    #[test]
    fn dns_is_carried_and_a_lone_domain_is_a_search_domain() {
        let ip = json!([{"address": "10.0.0.2"}]);
        let cases = [
            (
                json!({"nameservers": ["10.0.0.1"], "domain": "d", "options": ["ndots:5"]}),
                (vec!["10.0.0.1"], vec!["d"]),
            ),
            (json!({"domain": "d", "search": ["a", "b"], "options": ["ndots:5"]}), (vec![], vec!["a", "b"])),
        ];
        for (dns, (servers, searches)) in cases {
            let found = attach("1.0.0", &json!({"ips": ip, "dns": dns})).unwrap().dns;
            assert_eq!((found.servers, found.searches), (strings(&servers), strings(&searches)));
            assert_eq!(found.options, ["ndots:5"]);
        }
        assert_eq!(attach("1.0.0", &json!({"ips": ip, "dns": null})).unwrap().dns, Dns::default());
    }

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn bad_results_are_refused_and_say_why() {
        let cases: &[(&str, &str)] = &[
            ("", "printed no result"),
            (" \n", "printed no result"),
            ("hello", "printed no CNI result"),
            ("[]", "printed no CNI result"),
            ("{}", "no address"),
            (r#"{"cniVersion":"0.2.0","ip4":{"ip":"10.0.0.2/24"}}"#, "0.2.0 or older"),
            (r#"{"cniVersion":"2.0.0"}"#, "another version"),
            (r#"{"cniVersion":7}"#, "not a string"),
            (r#"{"ips":[{"address":"10.0.0.300/24"}]}"#, "bad address"),
            (r#"{"ips":[{"address":"10.0.0.3/33"}]}"#, "bad address"),
            (r#"{"ips":[{"address":"10.0.0.3/"}]}"#, "bad address"),
            (r#"{"ips":[{}]}"#, "malformed"),
            (r#"{"ips":{"address":"10.0.0.3"}}"#, "malformed"),
            (r#"{"interfaces":[7]}"#, "malformed"),
        ];
        for (text, expected) in cases {
            let error =
                decode(text.as_bytes(), Version::V1_0_0).and_then(|r| attachment(r, "eth0")).unwrap_err();
            assert!(error.to_string().contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn an_interface_that_does_not_exist_is_no_interface() {
        for index in [-1_i64, 7, i64::MAX] {
            let result = json!({"interfaces": [], "ips": [{"address": "10.0.0.2/24", "interface": index}]});
            assert_eq!(ips(&attach("1.0.0", &result).unwrap()), ["10.0.0.2"]);
        }
    }

    proptest::proptest! {
        #[test]
        fn no_output_panics(text in ".{0,200}", json in r#"\{"(ips|dns|interfaces|cniVersion)": ?(\[|\{|"|1|null).{0,40}"#) {
            for input in [text, json] {
                let _ = decode(input.as_bytes(), Version::V1_0_0).and_then(|r| attachment(r, "eth0"));
            }
        }
    }
}
