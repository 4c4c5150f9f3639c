//! Our CRI contract is upstream's on the wire: every service, message, field and enum value of `proto/cri/v1/api.proto`
//! is compared with the descriptors that the pinned `k8s.io/cri-api` ships.
//!
//! Both sides are compiled descriptors, put into lines by the same function: one line per fact, so that a difference
//! reads as a diff. What has no line is compared all the same, as a whole, at the end.
//!
//! Needs Go, and the network when the pinned modules are not in Go's cache. It is never skipped without a word: on a
//! machine that cannot have Go set `OCID_TEST_WITHOUT_GO=1`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use protobuf::Message;
use protobuf::descriptor::field_descriptor_proto::{Label, Type};
use protobuf::descriptor::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet,
    MethodOptions, ServiceDescriptorProto,
};
use protobuf::text_format::print_to_string;

#[test]
fn our_contract_is_upstreams() {
    if std::env::var_os("OCID_TEST_WITHOUT_GO").is_some() {
        eprintln!("OCID_TEST_WITHOUT_GO is set: the CRI contract was not compared with upstream's");
        return;
    }
    let (ours, upstream) = (ours(), only_file(&upstream_descriptors()));
    let report = differences(&ours, &upstream);
    assert!(report.is_empty(), "proto/cri/v1/api.proto differs (- upstream, + ours):\n{report}");
    // The lines show what we know to look at; this catches the rest.
    assert!(
        ours == upstream,
        "the descriptors differ in something that `definitions` does not show: add it there"
    );
}

#[test]
fn every_kind_of_change_is_reported_under_its_definition() {
    type Change = fn(&mut FileDescriptorProto);
    let changes: [(&str, Change, &str); 10] = [
        ("a number", |f| message(f, "PodIP").field[0].set_number(7), "message PodIP"),
        ("a name", |f| message(f, "PodIP").field[0].set_name("ip6".into()), "message PodIP"),
        ("a type", |f| message(f, "PodIP").field[0].set_type(Type::TYPE_BYTES), "message PodIP"),
        ("a label", |f| message(f, "PodIP").field[0].set_label(Label::LABEL_REPEATED), "message PodIP"),
        ("a field less", |f| message(f, "PodIP").field.clear(), "message PodIP"),
        ("a secret no more", |f| message(f, "AuthConfig").field[1].options.clear(), "message AuthConfig"),
        (
            "a message inside another",
            |f| message(f, "Mount").nested_type.push(DescriptorProto::new()),
            "message Mount.",
        ),
        ("a message less", |f| f.message_type.retain(|m| m.name() != "PodIP"), "message PodIP"),
        ("a stream", |f| f.service[0].method[0].set_server_streaming(true), "service ImageService"),
        ("an enum value", |f| f.enum_type[0].value[0].set_number(9), "enum CgroupDriver"),
    ];
    let original = ours();
    for (what, change, definition) in changes {
        let mut changed = original.clone();
        change(&mut changed);
        let report = differences(&changed, &original);
        assert!(report.lines().any(|line| line == definition), "{what}: no `{definition}` in\n{report}");
    }
}

#[test]
fn what_is_equal_is_not_reported() {
    assert_eq!(differences(&ours(), &ours()), "");
}

fn message<'a>(file: &'a mut FileDescriptorProto, name: &str) -> &'a mut DescriptorProto {
    file.message_type.iter_mut().find(|m| m.name() == name).expect("the message is in the contract")
}

fn ours() -> FileDescriptorProto {
    only_file(ocid_api::cri::DESCRIPTORS)
}

/// Upstream's descriptors, printed by a Go program that links upstream's package.
fn upstream_descriptors() -> Vec<u8> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/go-tool");
    let built = output(Command::new(script).arg("cri-descriptors"));
    let program = String::from_utf8(built).expect("a path in our own cache is UTF-8");
    output(&mut Command::new(program.trim_end()))
}

fn output(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap_or_else(|e| panic!("run {command:?}: {e}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{stderr}", output.status);
    output.stdout
}

/// The one file of a descriptor set, without what may differ: where the file is, which Go package it makes, comments,
/// and the order of definitions.
fn only_file(encoded: &[u8]) -> FileDescriptorProto {
    let mut set = FileDescriptorSet::parse_from_bytes(encoded).expect("a descriptor set");
    let mut file = set.file.pop().expect("a descriptor set has a file");
    assert!(set.file.is_empty(), "the contract is one file");
    file.clear_name();
    file.source_code_info.clear();
    if let Some(options) = file.options.as_mut() {
        options.clear_go_package();
    }
    file.message_type.sort_by(|a, b| a.name().cmp(b.name()));
    file.enum_type.sort_by(|a, b| a.name().cmp(b.name()));
    file.service.sort_by(|a, b| a.name().cmp(b.name()));
    for message in &mut file.message_type {
        message.field.sort_by_key(FieldDescriptorProto::number);
        message.nested_type.sort_by(|a, b| a.name().cmp(b.name()));
    }
    for service in &mut file.service {
        service.method.sort_by(|a, b| a.name().cmp(b.name()));
        // `rpc X(…) {}` carries an empty set of options, `rpc X(…);` carries none.
        for method in &mut service.method {
            if method.options.as_ref() == Some(&MethodOptions::new()) {
                method.options.clear();
            }
        }
    }
    file
}

/// A readable diff, definition by definition; empty if there is none.
fn differences(ours: &FileDescriptorProto, upstream: &FileDescriptorProto) -> String {
    let (ours, upstream) = (definitions(ours), definitions(upstream));
    let nothing = BTreeSet::new();
    let names: BTreeSet<_> = ours.keys().chain(upstream.keys()).collect();
    let mut report = String::new();
    for name in names {
        let (mine, theirs) = (ours.get(name).unwrap_or(&nothing), upstream.get(name).unwrap_or(&nothing));
        if mine == theirs && ours.contains_key(name) == upstream.contains_key(name) {
            continue;
        }
        report.push_str(&format!("{name}\n"));
        match (ours.contains_key(name), upstream.contains_key(name)) {
            (false, _) => report.push_str("  - all of it\n"),
            (_, false) => report.push_str("  + all of it\n"),
            _ => {}
        }
        theirs.difference(mine).for_each(|line| report.push_str(&format!("  - {line}\n")));
        mine.difference(theirs).for_each(|line| report.push_str(&format!("  + {line}\n")));
    }
    report
}

/// Name of a definition → its facts.
type Definitions = BTreeMap<String, BTreeSet<String>>;

fn definitions(file: &FileDescriptorProto) -> Definitions {
    let mut all = Definitions::new();
    let facts = [
        format!("syntax {}", file.syntax()),
        format!("package {}", file.package()),
        format!("imports {:?}", file.dependency),
        format!("options {{{}}}", print_to_string(&*file.options)),
    ];
    all.insert("file".into(), facts.into());
    for service in &file.service {
        all.insert(format!("service {}", service.name()), service_facts(service));
    }
    for message in &file.message_type {
        add_message(&mut all, "", message);
    }
    for enumeration in &file.enum_type {
        all.insert(format!("enum {}", enumeration.name()), enum_facts(enumeration));
    }
    all
}

fn service_facts(service: &ServiceDescriptorProto) -> BTreeSet<String> {
    let stream = |streams| if streams { "stream " } else { "" };
    let method = service.method.iter().map(|m| {
        format!(
            "rpc {}({}{}) returns ({}{}) {{{}}}",
            m.name(),
            stream(m.client_streaming()),
            m.input_type(),
            stream(m.server_streaming()),
            m.output_type(),
            print_to_string(&*m.options),
        )
    });
    let options = format!("options {{{}}}", print_to_string(&*service.options));
    method.chain([options]).collect()
}

/// A message under its full name, and after it what is defined inside.
fn add_message(all: &mut Definitions, outer: &str, message: &DescriptorProto) {
    let name = format!("{outer}{}", message.name());
    let mut facts: BTreeSet<String> = message.field.iter().map(|f| field_fact(message, f)).collect();
    // The end of a message's reserved range is not part of it; of an enum's it is.
    facts.extend(message.reserved_range.iter().map(|r| format!("reserved {}..{}", r.start(), r.end())));
    facts.extend(message.reserved_name.iter().map(|n| format!("reserved {n:?}")));
    facts.extend(message.oneof_decl.iter().map(|o| format!("oneof {}", o.name())));
    facts.insert(format!("options {{{}}}", print_to_string(&*message.options)));
    all.insert(format!("message {name}"), facts);
    let inside = format!("{name}.");
    for nested in &message.nested_type {
        add_message(all, &inside, nested);
    }
    for nested in &message.enum_type {
        all.insert(format!("enum {inside}{}", nested.name()), enum_facts(nested));
    }
}

fn field_fact(message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    let oneof = match field.oneof_index {
        Some(index) => {
            let declared = usize::try_from(index).ok().and_then(|index| message.oneof_decl.get(index));
            format!(" oneof {}", declared.map_or("(undeclared)", |o| o.name()))
        }
        None => String::new(),
    };
    format!(
        "{:3} {:?} {:?}{} {} json {:?}{oneof}{} {{{}}}",
        field.number(),
        field.label(),
        field.type_(),
        field.type_name(),
        field.name(),
        field.json_name(),
        if field.proto3_optional() { " proto3-optional" } else { "" },
        // Options that this library does not know by name, `debug_redact` (16) among them, appear by their number.
        print_to_string(&*field.options),
    )
}

fn enum_facts(enumeration: &EnumDescriptorProto) -> BTreeSet<String> {
    let options = format!("options {{{}}}", print_to_string(&*enumeration.options));
    let values = enumeration.value.iter().map(|v| {
        let options = print_to_string(&*v.options);
        format!("{:3} {} {{{options}}}", v.number(), v.name())
    });
    let ranges = enumeration.reserved_range.iter().map(|r| format!("reserved {}..={}", r.start(), r.end()));
    let names = enumeration.reserved_name.iter().map(|n| format!("reserved {n:?}"));
    values.chain(ranges).chain(names).chain([options]).collect()
}
