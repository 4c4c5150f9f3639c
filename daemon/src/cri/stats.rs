//! Usage as CRI shows it.

use ocid_api::cri;

use crate::pod::Container;
use crate::stats::{Measured, Usage};

pub(super) fn attributes(container: &Container) -> cri::ContainerAttributes {
    let spec = container.spec();
    cri::ContainerAttributes {
        id: container.id().to_string(),
        metadata: Some(cri::ContainerMetadata { name: spec.name.name.clone(), attempt: spec.name.attempt }),
        labels: spec.labels.clone(),
        annotations: spec.annotations.clone(),
    }
}

pub(super) fn container(
    attributes: cri::ContainerAttributes,
    usage: &Usage,
    mountpoint: &str,
) -> cri::ContainerStats {
    let value = |value| Some(cri::UInt64Value { value });
    let memory = &usage.cgroup;
    let available = memory.memory_limit_bytes.map(|limit| limit.saturating_sub(memory.working_set_bytes));
    cri::ContainerStats {
        attributes: Some(attributes),
        cpu: Some(cri::CpuUsage {
            timestamp: usage.at_ns,
            usage_core_nano_seconds: value(memory.cpu_ns),
            usage_nano_cores: usage.nano_cores.and_then(value),
            psi: None,
        }),
        memory: Some(cri::MemoryUsage {
            timestamp: usage.at_ns,
            working_set_bytes: value(memory.working_set_bytes),
            available_bytes: available.and_then(value),
            usage_bytes: value(memory.memory_bytes),
            rss_bytes: value(memory.rss_bytes),
            page_faults: value(memory.page_faults),
            major_page_faults: value(memory.major_page_faults),
            psi: None,
        }),
        writable_layer: usage.writable_layer.as_ref().map(|measured| filesystem(measured, mountpoint)),
        swap: Some(cri::SwapUsage {
            timestamp: usage.at_ns,
            swap_usage_bytes: value(memory.swap_bytes),
            swap_available_bytes: None,
        }),
        io: None,
    }
}

pub(super) fn filesystem(measured: &Measured, mountpoint: &str) -> cri::FilesystemUsage {
    cri::FilesystemUsage {
        timestamp: measured.at_ns,
        fs_id: Some(cri::FilesystemIdentifier { mountpoint: mountpoint.to_owned() }),
        used_bytes: Some(cri::UInt64Value { value: measured.bytes }),
        inodes_used: Some(cri::UInt64Value { value: measured.inodes }),
    }
}
