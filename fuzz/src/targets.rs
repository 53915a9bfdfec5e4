//! Fuzz targets: how inputs are created, and the reader under test.

use crate::mutate::{Random, mutate};
use ddpm::interop::{ImportOptions, read_bytes, read_index, read_settings};
use std::io::{Cursor, Read, Write};
use std::path::Path;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

/// A reader with its input generator.
pub struct Target {
    pub name: &'static str,
    /// Folder of its seed files.
    pub seeds: &'static str,
    /// Creates input `i` for a random seed.
    pub make: fn(&[Seed], u64, u64) -> Vec<u8>,
    /// Reads the input; returns whether it was accepted.
    pub read: fn(&[u8]) -> bool,
}

/// A seed file.
pub struct Seed {
    pub bytes: Vec<u8>,
    /// Names and contents of its members, if it is a zip archive.
    pub parts: Vec<(String, Vec<u8>)>,
}

pub const TARGETS: &[Target] = &[
    // A valid archive with mutated members: its checksums are correct, so the reader gets to the pickle.
    Target { name: "pth", seeds: "pth", make: mutate_parts, read: read_weights },
    Target {
        name: "pth-legacy",
        seeds: "legacy",
        make: |s, seed, i| mutate_bytes(s, seed, i, 8192),
        read: read_weights,
    },
    Target { name: "safetensors", seeds: "safetensors", make: mutate_header, read: read_weights },
    Target {
        name: "config",
        seeds: "config",
        make: |s, seed, i| mutate_bytes(s, seed, i, 0),
        read: read_configs,
    },
    Target {
        name: "zip",
        seeds: "pth",
        make: |s, seed, i| mutate_bytes(s, seed, i, 2048),
        read: read_weights,
    },
];

/// Loads the seed files in a folder.
pub fn seeds(folder: &Path) -> Vec<Seed> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut paths: Vec<_> = entries.map(|e| e.expect("a file").path()).collect();
    paths.sort();
    let seed = |path: &std::path::PathBuf| {
        let bytes = std::fs::read(path).expect("a seed");
        let mut parts = Vec::new();
        if let Ok(mut zip) = ZipArchive::new(Cursor::new(&bytes)) {
            for i in 0..zip.len() {
                let mut entry = zip.by_index(i).expect("an entry");
                let (name, mut content) = (entry.name().expect("a name").into_owned(), Vec::new());
                entry.read_to_end(&mut content).expect("an entry's content");
                parts.push((name, content));
            }
        }
        Seed { bytes, parts }
    };
    paths.iter().map(seed).collect()
}

fn mutate_bytes(seeds: &[Seed], seed: u64, i: u64, ends: usize) -> Vec<u8> {
    let mut r = Random::new(seed, i);
    let all: Vec<&Seed> = seeds.iter().collect();
    let (one, other) = (r.pick(&all), r.pick(&all));
    let mut bytes = one.bytes.clone();
    let ends = if ends == 0 { bytes.len() } else { ends };
    mutate(&mut bytes, &other.bytes, ends, &mut r);
    bytes
}

fn mutate_parts(seeds: &[Seed], seed: u64, i: u64) -> Vec<u8> {
    let mut r = Random::new(seed, i);
    let all: Vec<&Seed> = seeds.iter().collect();
    let (one, other) = (r.pick(&all), r.pick(&all));
    let pickle =
        |seed: &Seed| seed.parts.iter().find(|(name, _)| name.ends_with("data.pkl")).map(|(_, p)| p.clone());
    let other = pickle(other).unwrap_or_default();
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    // Usually mutates the pickle, sometimes another member or the compression method.
    let which = if r.below(8) == 0 { r.below(one.parts.len()) } else { 0 };
    let method = if r.below(8) == 0 { CompressionMethod::Deflated } else { CompressionMethod::Stored };
    for (at, (name, content)) in one.parts.iter().enumerate() {
        let mut content = content.clone();
        if at == which {
            let len = content.len();
            mutate(&mut content, &other, len, &mut r);
        }
        let options = SimpleFileOptions::default().compression_method(method);
        let written = zip.start_file(name.as_str(), options).map(|()| zip.write_all(&content));
        written.expect("a part").expect("its content");
    }
    zip.finish().expect("an archive").into_inner()
}

/// Mutates a safetensors header, usually with the correct length in front.
fn mutate_header(seeds: &[Seed], seed: u64, i: u64) -> Vec<u8> {
    let mut r = Random::new(seed, i);
    let all: Vec<&Seed> = seeds.iter().collect();
    let (one, other) = (r.pick(&all), r.pick(&all));
    let (length, rest) = one.bytes.split_first_chunk::<8>().expect("a seed of safetensors");
    let length = u64::from_le_bytes(*length) as usize;
    let mut header = rest[..length].to_vec();
    let end = header.len();
    mutate(&mut header, &other.bytes[..1024.min(other.bytes.len())], end, &mut r);
    let declared_len = if r.below(16) == 0 { r.below(1 << 20) as u64 } else { header.len() as u64 };
    let mut bytes = declared_len.to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend(&rest[length..]);
    if r.below(16) == 0 {
        let len = bytes.len();
        mutate(&mut bytes, &other.bytes, len, &mut r);
    }
    bytes
}

fn read_weights(bytes: &[u8]) -> bool {
    read_bytes(Path::new("input"), bytes, &ImportOptions::default()).is_ok()
}

/// Reads the same bytes as each of the three configuration files.
fn read_configs(bytes: &[u8]) -> bool {
    let (config, empty) = (Path::new("config.json"), (Path::new("empty.json"), &b"{}"[..]));
    let read = [
        read_settings((config, bytes), empty).is_ok(),
        read_settings(empty, (config, bytes)).is_ok(),
        read_index(config, bytes).is_ok(),
    ];
    read.contains(&true)
}
