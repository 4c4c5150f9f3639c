//! The large image: seven gzip layers of about 23 MB, made of this machine's own files, small ones and large ones.
//!
//! Packing takes long, so the layers are kept. Each pull needs an image that neither runtime has seen, and deleting the
//! last one would make ext4 slow for minutes; so a variant has the same layers behind a member of a few bytes of its own:
//! gzip allows several members one after the other.

use std::fs;
use std::io::{Read as _, Write};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use harness::image::Built;
use sha2::{Digest, Sha256};

const LAYERS: usize = 7;
/// Compressed size at which a layer ends.
const LAYER_BYTES: u64 = 23_000_000;
/// Larger files would leave a layer with hardly any.
const FILE_BYTES_MAX: u64 = 12_000_000;

/// See the module.
#[derive(Debug)]
pub(crate) struct Big {
    layers: Vec<Vec<u8>>,
}

impl Big {
    /// Reads the layers from the cache, or packs them.
    pub(crate) fn new(cache: &Path) -> Big {
        let dir = cache.join("image-1");
        let path = |number| dir.join(format!("layer-{number}.tar.gz"));
        if !path(LAYERS - 1).exists() {
            crate::progress("packing the large image (once)");
            pack(&dir, path);
        }
        Big { layers: (0..LAYERS).map(|number| fs::read(path(number)).unwrap()).collect() }
    }

    /// One that differs from all others in every layer.
    pub(crate) fn variant(&self, name: &str) -> Built {
        let vary = |layer: &Vec<u8>| {
            let marker = marker(name);
            let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
            packed.write_all(&marker).unwrap();
            let mut packed = packed.finish().unwrap();
            packed.extend_from_slice(layer);
            let mut digest = Sha256::new();
            digest.update(&marker);
            std::io::copy(&mut GzDecoder::new(&layer[..]), &mut Hashing(&mut digest)).unwrap();
            (packed, format!("sha256:{}", hex::encode(digest.finalize())))
        };
        Built::of_packed(self.layers.iter().map(vary).collect())
    }

    /// Bytes compressed and unpacked.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        let unpacked =
            |layer: &Vec<u8>| std::io::copy(&mut GzDecoder::new(&layer[..]), &mut std::io::sink()).unwrap();
        (self.layers.iter().map(|l| l.len() as u64).sum(), self.layers.iter().map(unpacked).sum())
    }
}

struct Hashing<'a>(&'a mut Sha256);

impl Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// One small file's entry, without an archive's end.
fn marker(name: &str) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = header(name.len() as u64);
    archive.append_data(&mut header, "variant", name.as_bytes()).unwrap();
    let mut bytes = archive.into_inner().unwrap();
    bytes.truncate(bytes.len() - 1024);
    bytes
}

fn header(size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header
}

fn pack(dir: &Path, path: impl Fn(usize) -> PathBuf) {
    fs::create_dir_all(dir).unwrap();
    let (mut small, mut large) = (files(Path::new("/usr/share")), files(Path::new("/usr/lib")));
    for number in 0..LAYERS {
        // The first layers have many small files, the others few large ones.
        let from = if number < 3 { &mut small } else { &mut large };
        let part = path(number).with_extension("part");
        let packed = GzEncoder::new(fs::File::create(&part).unwrap(), Compression::new(6));
        let mut archive = tar::Builder::new(packed);
        for file in from.by_ref() {
            let mut content = Vec::new();
            if fs::File::open(&file).and_then(|mut f| f.read_to_end(&mut content)).is_err() {
                continue;
            }
            let name = Path::new(&format!("layer-{number}")).join(file.strip_prefix("/").unwrap());
            archive.append_data(&mut header(content.len() as u64), name, &content[..]).unwrap();
            if part.metadata().unwrap().len() > LAYER_BYTES {
                break;
            }
        }
        archive.into_inner().unwrap().finish().unwrap();
        fs::rename(part, path(number)).unwrap();
    }
}

/// The regular files below a directory, in the order of their names.
fn files(dir: &Path) -> Box<dyn Iterator<Item = PathBuf>> {
    let mut entries: Vec<_> = fs::read_dir(dir).into_iter().flatten().flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    Box::new(entries.into_iter().flat_map(|entry| -> Box<dyn Iterator<Item = PathBuf>> {
        match entry.metadata() {
            Ok(meta) if meta.is_dir() => files(&entry.path()),
            Ok(meta) if meta.is_file() && meta.len() <= FILE_BYTES_MAX => {
                Box::new(std::iter::once(entry.path()))
            }
            _ => Box::new(std::iter::empty()),
        }
    }))
}
