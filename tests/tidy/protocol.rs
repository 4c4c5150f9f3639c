//! The shim's protocol only grows: all that the released contract says, today's says too.
//!
//! `shim.proto.released` is the contract as last released, word for word; a release replaces it by a copy of
//! `proto/shim/v1/shim.proto`, and nothing else does. Before the first release it is the contract as first agreed.
//!
//! What is compared is the wire: a call with its types, a field with its type, name, number and place, an enum value.
//! Names count, because records are read by people and by JSON. Comments and order do not.

use std::collections::BTreeMap;
use std::path::Path;

use crate::Finding;
use crate::source::read;

const TODAY: &str = "proto/shim/v1/shim.proto";
const RELEASED: &str = "tests/tidy/shim.proto.released";

pub(crate) fn only_grows(root: &Path) -> Vec<Finding> {
    shrunk(&read(&root.join(RELEASED)), &read(&root.join(TODAY)))
}

/// What was released and is said no more.
fn shrunk(released: &str, today: &str) -> Vec<Finding> {
    let today = facts(today);
    facts(released)
        .into_iter()
        .filter(|(fact, _)| !today.contains_key(fact))
        .map(|(fact, line)| Finding {
            file: TODAY.into(),
            line: 0,
            advice: format!(
                "released and now missing or changed: `{fact}` (line {line} of {RELEASED}). Shims and records of \
                 earlier releases have it: put it back, and add a new number for what is new"
            ),
        })
        .collect()
}

/// Each statement after the definitions that it is in, with its line.
fn facts(proto: &str) -> BTreeMap<String, usize> {
    let mut facts = BTreeMap::new();
    let (mut outer, mut statement) = (Vec::new(), String::new());
    for (number, line) in (1..).zip(proto.lines()) {
        let code = line.split("//").next().unwrap_or_default();
        for c in code.chars().chain([' ']) {
            match c {
                '{' => outer.push(words(&std::mem::take(&mut statement))),
                '}' => {
                    outer.pop();
                    statement.clear();
                }
                ';' => {
                    let said = words(&std::mem::take(&mut statement));
                    // Options such as `deprecated` may come and go.
                    let said = said.split(" [").next().unwrap_or_default().to_owned();
                    if !said.is_empty() {
                        facts.insert([outer.join(" / "), said].join(": "), number);
                    }
                }
                c => statement.push(c),
            }
        }
    }
    facts
}

fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const RELEASED: &str = "syntax = \"proto3\";\nservice S { rpc A(B) returns (stream C); }\n\
                            message B {\n  // A comment.\n  string x = 1;\n  oneof k { C c = 2; }\n}\nenum E { Z = 0; }";

    #[test]
    fn growth_comments_and_order_are_fine() {
        let today = "syntax = \"proto3\";\nenum E { Z = 0; Y = 1; }\nmessage B { oneof k { C c = 2; D d = 4; }\n\
                     string   x = 1 [deprecated = true]; // other words\n bytes y = 3; }\n\
                     service S {\n rpc A(B)\n returns (stream C);\n rpc N(B) returns (C); }";
        assert_eq!(shrunk(RELEASED, today), []);
    }

    #[test]
    fn every_kind_of_loss_is_found() {
        for (from, to) in [
            ("x = 1", "x = 7"),
            ("string x", "bytes x"),
            ("string x", "string renamed"),
            ("  string x = 1;\n", ""),
            ("stream C", "C"),
            ("rpc A(B)", "rpc A(D)"),
            ("Z = 0", "Z = 1"),
            ("message B", "message G"),
            ("oneof k", "oneof other"),
        ] {
            assert!(RELEASED.contains(from), "{from}");
            assert!(!shrunk(RELEASED, &RELEASED.replace(from, to)).is_empty(), "{from} -> {to}");
        }
    }
}
