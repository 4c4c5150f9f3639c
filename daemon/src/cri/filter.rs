//! List filters. All fields must match; a label selector is exact; an id may be a beginning of one; an unknown id gives
//! an empty list, not an error.

use std::collections::BTreeMap;

use ocid_api::cri;

type Labels = BTreeMap<String, String>;

pub(super) fn pod(filter: &cri::PodSandboxFilter, pod: &cri::PodSandbox) -> bool {
    pod.id.starts_with(&filter.id)
        && has(&pod.labels, &filter.label_selector)
        && filter.state.as_ref().is_none_or(|wanted| wanted.state == pod.state)
}

pub(super) fn container(filter: &cri::ContainerFilter, container: &cri::Container) -> bool {
    container.id.starts_with(&filter.id)
        && container.pod_sandbox_id.starts_with(&filter.pod_sandbox_id)
        && has(&container.labels, &filter.label_selector)
        && filter.state.as_ref().is_none_or(|wanted| wanted.state == container.state)
}

pub(super) fn container_stats(
    filter: &cri::ContainerStatsFilter,
    pod: &str,
    attributes: &cri::ContainerAttributes,
) -> bool {
    attributes.id.starts_with(&filter.id)
        && pod.starts_with(&filter.pod_sandbox_id)
        && has(&attributes.labels, &filter.label_selector)
}

fn has(labels: &Labels, selector: &Labels) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn every_field_of_a_filter_must_match() {
        let made = cri::Container {
            id: "abc".into(),
            pod_sandbox_id: "pod".into(),
            state: cri::ContainerState::ContainerRunning.into(),
            labels: labels(&[("a", "1"), ("b", "2")]),
            ..Default::default()
        };
        let running = cri::ContainerStateValue { state: cri::ContainerState::ContainerRunning.into() };
        let exited = cri::ContainerStateValue { state: cri::ContainerState::ContainerExited.into() };
        let none = cri::ContainerFilter::default();
        let table = [
            (none.clone(), true),
            (cri::ContainerFilter { id: "ab".into(), ..none.clone() }, true),
            (cri::ContainerFilter { id: "b".into(), ..none.clone() }, false),
            (
                cri::ContainerFilter { pod_sandbox_id: "pod".into(), state: Some(running), ..none.clone() },
                true,
            ),
            (cri::ContainerFilter { state: Some(exited), ..none.clone() }, false),
            (cri::ContainerFilter { label_selector: labels(&[("a", "1")]), ..none.clone() }, true),
            (cri::ContainerFilter { label_selector: labels(&[("a", "2")]), ..none.clone() }, false),
            (cri::ContainerFilter { label_selector: labels(&[("c", "1")]), ..none }, false),
        ];
        for (filter, expected) in table {
            assert_eq!(container(&filter, &made), expected, "{filter:?}");
        }
    }
}
