//! Name and id to pod. A name in use joins, never races.

use std::borrow::Borrow;
use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ocid_api::id::{ContainerId, PodId};

use super::handle::{Container, Pod, Reserved};
use crate::error::{Error, Result};
use crate::spec::{PodName, PodSpec};

/// All pods of a node.
#[derive(Debug, Default)]
pub(super) struct Index(Mutex<Tables>);

#[derive(Debug, Default)]
struct Tables {
    pods: BTreeMap<PodId, Arc<Pod>>,
    names: HashMap<PodName, PodId>,
    containers: BTreeMap<ContainerId, PodId>,
}

impl Index {
    /// The pod of this name if it is ready or on its way; else a new one, which takes the name.
    pub(super) fn reserve(&self, spec: PodSpec) -> Reserved<Pod> {
        let mut tables = self.lock();
        if let Some(old) = tables.names.get(&spec.name).and_then(|id| tables.pods.get(id)) {
            let on_its_way = !old.birth.succeeded() && !old.birth.failed();
            if on_its_way || (old.birth.succeeded() && old.ready()) {
                return Reserved::Existing(Arc::clone(old));
            }
        }
        let pod = Arc::new(Pod::new(PodId::generate(), spec));
        tables.names.insert(pod.spec().name.clone(), pod.id().clone());
        tables.pods.insert(pod.id().clone(), Arc::clone(&pod));
        Reserved::New(pod)
    }

    /// Adds a pod that is on record, with its containers.
    pub(super) fn adopt(&self, pod: Arc<Pod>) {
        let mut tables = self.lock();
        for container in pod.containers() {
            tables.containers.insert(container.id().clone(), pod.id().clone());
        }
        // Of two pods of one name the later attempt to use it is the ready one.
        if pod.ready() || !tables.names.contains_key(&pod.spec().name) {
            tables.names.insert(pod.spec().name.clone(), pod.id().clone());
        }
        tables.pods.insert(pod.id().clone(), pod);
    }

    /// Makes a pod's name free for others, while the pod stays listed.
    pub(super) fn free_name(&self, pod: &Pod) {
        let mut tables = self.lock();
        if tables.names.get(&pod.spec().name) == Some(pod.id()) {
            tables.names.remove(&pod.spec().name);
        }
    }

    /// Forgets a pod and its containers.
    pub(super) fn forget(&self, pod: &Pod) {
        self.free_name(pod);
        let mut tables = self.lock();
        tables.pods.remove(pod.id());
        tables.containers.retain(|_, owner| owner != pod.id());
    }

    pub(super) fn add_container(&self, pod: &Pod, id: &ContainerId) {
        self.lock().containers.insert(id.clone(), pod.id().clone());
    }

    pub(super) fn forget_container(&self, id: &ContainerId) {
        self.lock().containers.remove(id);
    }

    /// All pods, ordered by id.
    pub(super) fn pods(&self) -> Vec<Arc<Pod>> {
        self.lock().pods.values().cloned().collect()
    }

    /// The pod of an id or of a unique beginning of one.
    pub(super) fn pod(&self, text: &str) -> Result<Arc<Pod>> {
        let tables = self.lock();
        let (_, pod) = unique(&tables.pods, text, "pod")?;
        Ok(Arc::clone(pod))
    }

    /// The container of an id or of a unique beginning of one, and its pod.
    pub(super) fn container(&self, text: &str) -> Result<(Arc<Pod>, Arc<Container>)> {
        let tables = self.lock();
        let (id, owner) = unique(&tables.containers, text, "container")?;
        let found = tables.pods.get(owner).and_then(|pod| Some((Arc::clone(pod), pod.container(id)?)));
        found.ok_or_else(|| missing("container", text))
    }

    fn lock(&self) -> MutexGuard<'_, Tables> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unique<'a, K: Ord + Borrow<str>, V>(
    map: &'a BTreeMap<K, V>,
    text: &str,
    what: &str,
) -> Result<(&'a K, &'a V)> {
    if text.is_empty() {
        return Err(Error::invalid(format!("{what} id is empty")));
    }
    let from = (Bound::Included(text), Bound::Unbounded);
    let mut matching = map.range::<str, _>(from).take_while(|(id, _)| (*id).borrow().starts_with(text));
    match (matching.next(), matching.next()) {
        (Some(found), None) => Ok(found),
        (Some(_), Some(_)) => Err(Error::invalid(format!("{text:?} begins the ids of several {what}s"))),
        (None, _) => Err(missing(what, text)),
    }
}

fn missing(what: &str, text: &str) -> Error {
    // The text is a peer's: show little of it, and escaped.
    let shown: String = text.chars().take(80).collect();
    Error::not_found(format!("{what} {shown:?} not found"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn an_id_is_found_by_a_unique_beginning() {
        let map = BTreeMap::from([("abc".to_owned(), 1), ("abd".to_owned(), 2), ("b".to_owned(), 3)]);
        assert_eq!(*unique(&map, "abc", "pod").unwrap().1, 1);
        assert_eq!(*unique(&map, "b", "pod").unwrap().1, 3);
        assert_eq!(unique(&map, "ab", "pod").unwrap_err().kind(), Kind::InvalidArgument);
        assert_eq!(unique(&map, "c", "pod").unwrap_err().kind(), Kind::NotFound);
        assert_eq!(unique(&map, "", "pod").unwrap_err().kind(), Kind::InvalidArgument);
    }
}
