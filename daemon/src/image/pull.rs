//! Resolve, fetch in parallel, unpack, name.
//!
//! A layer is never stored packed: its bytes go from the connection through the decompressor into its directory, hashed
//! on the way twice (as packed, for the digest; as unpacked, for the diff id), and the directory gets its name only if
//! both are right. A connection that breaks is resumed where it broke.
//!
//! Two pulls that need the same layer take turns: the second finds it there. Dropping a pull cancels it at once; layers
//! that are complete stay for the next.

use std::collections::{BTreeSet, HashMap};
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures_util::future::try_join_all;
use tokio::sync::mpsc;

use super::auth::Credentials;
use super::layer::{Below, Limits};
use super::manifest::{ImageConfig, Manifest, Platform};
use super::reference::{Digest, Hasher, Reference};
use super::registry::Client;
use super::unpack::{Compression, Unpacked, unpack};
use super::{Image, Images, Lease};
use crate::error::{Context, Error, Kind, Result};
use crate::snapshot::{ChainId, Stage};

/// Chunks of a layer between the connection and the decompressor.
const CHUNKS: usize = 32;
/// How often in a row a blob may break off without progress worth the name.
const RESUMES_MAX: u32 = 4;
/// What must have come since the last break for it to count as progress, in bytes.
const PROGRESS_BYTES: u64 = 64 << 10;
/// How long to wait before resuming for the first time in a row; then twice as long, and so on.
const RESUME_PAUSE: Duration = Duration::from_millis(100);
/// How soon a layer that waits for those below notices that it is cancelled.
const CANCEL_CHECK: Duration = Duration::from_millis(50);
/// Enough of a layer to tell how it is packed.
const MAGIC_BYTES: usize = 4;

/// An image whose documents are at hand: what remains is its layers.
pub(super) struct Found {
    /// Digest and bytes of every document that led here, the manifest last.
    pub(super) documents: Vec<(Digest, Bytes)>,
    pub(super) manifest: Manifest,
    pub(super) config: Bytes,
    pub(super) repo_tags: BTreeSet<String>,
    pub(super) repo_digests: BTreeSet<String>,
}

/// Where the bytes of a layer come from.
pub(super) enum Source<'a> {
    /// A registry.
    Registry { client: &'a Client, reference: &'a Reference, credentials: Option<&'a Credentials> },
    /// Files at hand.
    Local(&'a super::import::Blobs),
}

impl Images {
    /// Pulls an image and returns its id. What is here already is not fetched again. Dropping the future cancels.
    ///
    /// # Errors
    /// `InvalidArgument` for what is no reference; see [`super::registry`] and [`super::unpack`] for the rest.
    pub async fn pull(self: &Arc<Images>, text: &str, credentials: Option<Credentials>) -> Result<Digest> {
        let reference = Reference::parse(text)?;
        let credentials = credentials.as_ref();
        // Identical pulls queue: each asks the registry with its own credentials what the name means, and all but the
        // first find the rest here.
        let turn = self.turns.of(&reference.to_string());
        let _turn = turn.lock().await;
        let image = self.client.image(&reference, &Platform::host(), credentials).await?;
        let config = match self.content.get(&image.manifest.config.digest) {
            Ok(config) => config.into(),
            Err(_) => self.client.config(&reference, &image.manifest.config, credentials).await?,
        };
        // The digest by which others can pull the same is that of the first document, not of our platform's.
        let first = image.documents.first().map(|document| reference.repo_digest(&document.digest));
        let found = Found {
            documents: image.documents.into_iter().map(|d| (d.digest, d.bytes)).collect(),
            manifest: image.manifest,
            config,
            repo_tags: if reference.digest().is_some() {
                BTreeSet::new()
            } else {
                reference.repo_tag().into_iter().collect()
            },
            repo_digests: first.into_iter().collect(),
        };
        let source = Source::Registry { client: &self.client, reference: &reference, credentials };
        self.install(found, source).await.map_err(|e| e.during(format!("pull {reference}")))
    }

    /// Unpacks what is missing of an image and puts it in the index.
    pub(super) async fn install(self: &Arc<Images>, found: Found, source: Source<'_>) -> Result<Digest> {
        let config = ImageConfig::parse(&found.config)?;
        config.check_layers(&found.manifest)?;
        config.check_platform(&Platform::host())?;
        let diff_ids: Vec<&str> = config.diff_ids.iter().map(Digest::as_str).collect();
        let chain_ids = ChainId::chain(&diff_ids)?;
        let id = &found.manifest.config.digest;
        let names = chain_ids.iter().map(|chain_id| chain_id.hex().to_owned());
        let documents =
            found.documents.iter().map(|(digest, _)| digest).chain([id]).map(|d| d.hex().to_owned());
        let lease = {
            // No sweep is between looking at what is live and deleting the rest.
            let _index = self.index();
            Lease::new(&self.holds, names.chain(documents), false)
        };
        let done = Arc::new(Done::new(chain_ids.len()));
        let layers = (0..chain_ids.len()).map(|at| {
            let done = Arc::clone(&done);
            let (manifest, config, chain_ids, source) = (&found.manifest, &config, &chain_ids, &source);
            async move {
                self.layer(manifest, config, chain_ids, at, source, &done).await?;
                done.mark(at);
                Ok::<_, Error>(())
            }
        });
        try_join_all(layers).await?;
        let images = Arc::clone(self);
        // The lease goes along: a caller that goes away now does not stop it.
        let finish = move || images.finish(found, config.user, chain_ids, &lease);
        tokio::task::spawn_blocking(finish).await.context(Kind::Internal, || "finish the image".into())?
    }

    /// Puts all of an image on stable storage and then in the index. Waits for the disk.
    fn finish(&self, found: Found, user: String, chain_ids: Vec<ChainId>, _held: &Lease) -> Result<Digest> {
        let id = found.manifest.config.digest.clone();
        for (digest, bytes) in &found.documents {
            self.content.put(digest, bytes)?;
        }
        self.content.put(&id, &found.config)?;
        self.snapshots.sync()?;
        let mut size = found.config.len() as u64;
        for chain_id in &chain_ids {
            size = size.saturating_add(self.snapshots.usage(chain_id)?.bytes);
        }
        let image = Image {
            id: id.clone(),
            user,
            repo_tags: found.repo_tags,
            repo_digests: found.repo_digests,
            manifests: found.documents.into_iter().map(|(digest, _)| digest).collect(),
            chain_ids,
            size,
            pinned: false,
        };
        let image = self.index().add(image)?;
        tracing::info!(image = %id, names = ?image.repo_tags, layers = image.chain_ids.len(), "image is here");
        Ok(id)
    }

    /// Makes sure that one layer is among the snapshots.
    async fn layer(
        &self,
        manifest: &Manifest,
        config: &ImageConfig,
        chain_ids: &[ChainId],
        at: usize,
        source: &Source<'_>,
        done: &Arc<Done>,
    ) -> Result<()> {
        let chain_id = &chain_ids[at];
        if self.snapshots.has(chain_id) {
            return Ok(());
        }
        // The permit before the turn, and lower layers first: who has a turn can go on, so nobody waits in a circle.
        let _permit =
            self.permits.acquire().await.context(Kind::Internal, || "wait for a turn to fetch".into())?;
        let turn = self.turns.of(chain_id.hex());
        let _turn = turn.lock().await;
        if self.snapshots.has(chain_id) {
            return Ok(());
        }
        let blob = &manifest.layers[at].descriptor;
        let what = || format!("layer {} ({} of {})", blob.digest, at + 1, chain_ids.len());
        let stage = self.snapshots.stage()?;
        let lower: Vec<PathBuf> =
            chain_ids[..at].iter().rev().map(|id| self.snapshots.layer_dir(id)).collect();
        let (pump, reader) = source.open(&blob.digest, blob.size).map_err(|e| e.during(what()))?;
        let cancel = Arc::new(AtomicBool::new(false));
        let _cancel_on_drop = CancelOnDrop(Arc::clone(&cancel));
        // The stage goes along, so that it is removed by who fills it, also when this future is dropped.
        let done = Arc::clone(done);
        let wanted = (blob.digest.clone(), config.diff_ids[at].clone(), chain_id.clone());
        let work = tokio::task::spawn_blocking(move || {
            let (wanted, diff_id, chain_id) = wanted;
            let below = || {
                done.wait_below(at, &cancel)?;
                Ok(lower.clone())
            };
            let (stage, unpacked, digest) = verified(reader, stage, &below, &cancel)?;
            if digest != wanted {
                return Err(mismatch("digest", &wanted, &digest));
            }
            if unpacked.diff_id != diff_id.as_str() {
                return Err(mismatch("diff id", &diff_id, &unpacked.diff_id));
            }
            stage.commit(&chain_id, unpacked.usage)
        });
        let (pumped, committed) = tokio::join!(pump, work);
        let committed = committed.context(Kind::Internal, || "unpack".into())?;
        // If fetching went wrong too, that is why.
        committed.map_err(|e| pumped.err().unwrap_or(e).during(what()))
    }
}

fn mismatch(what: &str, wanted: &Digest, got: &impl std::fmt::Display) -> Error {
    Error::new(Kind::RegistryUnavailable, format!("{what} mismatch: wanted {wanted}, got {got}"))
}

/// Unpacks and hashes what a reader gives.
fn verified(
    mut reader: HashingReader,
    stage: Stage,
    below: &Below<'_>,
    cancel: &AtomicBool,
) -> Result<(Stage, Unpacked, Digest)> {
    let mut magic = [0; MAGIC_BYTES];
    let mut filled = 0;
    while filled < magic.len() {
        match reader.read(&mut magic[filled..]).context(Kind::Unavailable, || "read".into())? {
            0 => break,
            n => filled += n,
        }
    }
    let compression = Compression::detect(&magic[..filled]);
    let whole = Read::chain(&magic[..filled], &mut reader);
    let unpacked = unpack(whole, compression, stage.dir(), below, &Limits::default(), cancel)?;
    // What follows the end of the compressed stream is part of the blob all the same.
    io::copy(&mut reader, &mut io::sink()).context(Kind::Unavailable, || "read".into())?;
    Ok((stage, unpacked, reader.hasher.finish()))
}

type Pump<'a> = std::pin::Pin<Box<dyn Future<Output = Result<()>> + Send + 'a>>;

impl Source<'_> {
    /// A reader of a blob, and what must run for it to get its bytes.
    fn open(&self, digest: &Digest, size: u64) -> Result<(Pump<'_>, HashingReader)> {
        let hasher = Hasher::new(digest.algorithm());
        match self {
            Source::Local(blobs) => {
                let reader = HashingReader { inner: blobs.open_blob(digest)?, hasher };
                Ok((Box::pin(std::future::ready(Ok(()))), reader))
            }
            Source::Registry { client, reference, credentials } => {
                let (sender, receiver) = mpsc::channel(CHUNKS);
                let inner = Box::new(ChannelReader { receiver, chunk: Bytes::new() });
                let digest = digest.clone();
                let pump = async move { fetch(client, reference, *credentials, &digest, size, sender).await };
                Ok((Box::pin(pump), HashingReader { inner, hasher }))
            }
        }
    }
}

/// Sends a blob's bytes in order, resuming where a connection broke. A receiver that has gone is not an error here: why
/// it went is its own to say.
async fn fetch(
    client: &Client,
    reference: &Reference,
    credentials: Option<&Credentials>,
    digest: &Digest,
    size: u64,
    sender: mpsc::Sender<Bytes>,
) -> Result<()> {
    let mut sent = 0_u64;
    let mut sent_before = 0_u64;
    let mut failures = 0;
    loop {
        let mut blob = client.blob(reference, digest, size, sent, credentials).await?;
        // A host that cannot resume begins anew: drop what has been sent already.
        let mut skip = sent - blob.offset.min(sent);
        let broke = loop {
            match blob.chunk().await {
                Ok(None) => return Ok(()),
                Ok(Some(mut chunk)) => {
                    let dropped = usize::try_from(skip).unwrap_or(usize::MAX).min(chunk.len());
                    chunk.advance(dropped);
                    skip -= dropped as u64;
                    if chunk.is_empty() {
                        continue;
                    }
                    sent += chunk.len() as u64;
                    if sender.send(chunk).await.is_err() {
                        return Ok(());
                    }
                }
                Err(error) => break error,
            }
        };
        failures = if sent - sent_before >= PROGRESS_BYTES { 1 } else { failures + 1 };
        sent_before = sent;
        if failures > RESUMES_MAX {
            return Err(broke);
        }
        tracing::warn!(%digest, sent, error = %broke, "resuming a blob that broke off");
        tokio::time::sleep(RESUME_PAUSE * 2_u32.pow(failures - 1)).await;
    }
}

/// Reads what arrives on a channel. A sender that has gone is the end.
struct ChannelReader {
    receiver: mpsc::Receiver<Bytes>,
    chunk: Bytes,
}

impl Read for ChannelReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.chunk.is_empty() {
            match self.receiver.blocking_recv() {
                Some(chunk) => self.chunk = chunk,
                None => return Ok(0),
            }
        }
        let n = buffer.len().min(self.chunk.len());
        self.chunk.copy_to_slice(&mut buffer[..n]);
        Ok(n)
    }
}

/// Hashes what passes through.
struct HashingReader {
    inner: Box<dyn Read + Send>,
    hasher: Hasher,
}

impl Read for HashingReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..n]);
        Ok(n)
    }
}

/// Stops the blocking part of a pull that was dropped.
struct CancelOnDrop(Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Which layers of an image are there, for those above that want to look at them.
struct Done {
    layers: Mutex<Vec<bool>>,
    changed: Condvar,
}

impl Done {
    fn new(layers: usize) -> Done {
        Done { layers: Mutex::new(vec![false; layers]), changed: Condvar::new() }
    }

    fn mark(&self, at: usize) {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)[at] = true;
        self.changed.notify_all();
    }

    /// Blocks until all layers below are there. If one fails, the pull is dropped and this cancelled.
    fn wait_below(&self, at: usize, cancel: &AtomicBool) -> Result<()> {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        while !layers[..at].iter().all(|there| *there) {
            if cancel.load(Ordering::Acquire) {
                return Err(Error::new(Kind::Cancelled, "unpacking was cancelled"));
            }
            let waited = self.changed.wait_timeout(layers, CANCEL_CHECK);
            layers = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}

/// Whose turn it is, when several want the same layer or name.
#[derive(Default)]
pub(super) struct Turns(Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>);

impl Turns {
    fn of(&self, what: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| turn.strong_count() > 0);
        if let Some(turn) = turns.get(what).and_then(Weak::upgrade) {
            return turn;
        }
        let turn = Arc::default();
        turns.insert(what.to_owned(), Arc::downgrade(&turn));
        turn
    }
}
