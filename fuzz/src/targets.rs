//! What is fuzzed: how its inputs are made, and what reads them.

use crate::mutate::{Random, mutate};
use ddpm::interop::{Options, read_bytes, read_index, read_settings};
use std::io::{Cursor, Read, Write};
use std::path::Path;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

/// A reader and its inputs.
pub struct Target {
    pub name: &'static str,
    /// The folder of its seeds.
    pub seeds: &'static str,
    /// Input `i` of a seed.
    pub make: fn(&[Seed], u64, u64) -> Vec<u8>,
    /// Whether the input was read, and not refused.
    pub read: fn(&[u8]) -> bool,
}

/// A file to begin with.
pub struct Seed {
    pub bytes: Vec<u8>,
    /// Names and contents, of a zip archive.
    pub parts: Vec<(String, Vec<u8>)>,
}

pub const TARGETS: &[Target] = &[
    // An archive that is whole, of parts that are not: its checksums are right, so that the pickle is reached.
    Target { name: "pth", seeds: "pth", make: parts_mutated, read: weights },
    Target {
        name: "pth-legacy",
        seeds: "legacy",
        make: |s, seed, i| bytes_mutated(s, seed, i, 8192),
        read: weights,
    },
    Target { name: "safetensors", seeds: "safetensors", make: header_mutated, read: weights },
    Target {
        name: "config",
        seeds: "config",
        make: |s, seed, i| bytes_mutated(s, seed, i, 0),
        read: settings,
    },
    Target { name: "zip", seeds: "pth", make: |s, seed, i| bytes_mutated(s, seed, i, 2048), read: weights },
];

/// The files of a folder.
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

fn bytes_mutated(seeds: &[Seed], seed: u64, i: u64, ends: usize) -> Vec<u8> {
    let mut r = Random::new(seed, i);
    let all: Vec<&Seed> = seeds.iter().collect();
    let (one, other) = (r.pick(&all), r.pick(&all));
    let mut bytes = one.bytes.clone();
    let ends = if ends == 0 { bytes.len() } else { ends };
    mutate(&mut bytes, &other.bytes, ends, &mut r);
    bytes
}

fn parts_mutated(seeds: &[Seed], seed: u64, i: u64) -> Vec<u8> {
    let mut r = Random::new(seed, i);
    let all: Vec<&Seed> = seeds.iter().collect();
    let (one, other) = (r.pick(&all), r.pick(&all));
    let pickle =
        |seed: &Seed| seed.parts.iter().find(|(name, _)| name.ends_with("data.pkl")).map(|(_, p)| p.clone());
    let other = pickle(other).unwrap_or_default();
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    // Mostly the pickle; at times another part, or the way it is packed.
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

/// Mutates the list of tensors, and mostly gives it its right length.
fn header_mutated(seeds: &[Seed], seed: u64, i: u64) -> Vec<u8> {
    let mut r = Random::new(seed, i);
    let all: Vec<&Seed> = seeds.iter().collect();
    let (one, other) = (r.pick(&all), r.pick(&all));
    let (length, rest) = one.bytes.split_first_chunk::<8>().expect("a seed of safetensors");
    let length = u64::from_le_bytes(*length) as usize;
    let mut header = rest[..length].to_vec();
    let end = header.len();
    mutate(&mut header, &other.bytes[..1024.min(other.bytes.len())], end, &mut r);
    let told = if r.below(16) == 0 { r.below(1 << 20) as u64 } else { header.len() as u64 };
    let mut bytes = told.to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend(&rest[length..]);
    if r.below(16) == 0 {
        let len = bytes.len();
        mutate(&mut bytes, &other.bytes, len, &mut r);
    }
    bytes
}

fn weights(bytes: &[u8]) -> bool {
    read_bytes(Path::new("input"), bytes, &Options::default()).is_ok()
}

/// The same bytes as each of the three files.
fn settings(bytes: &[u8]) -> bool {
    let (config, empty) = (Path::new("config.json"), (Path::new("empty.json"), &b"{}"[..]));
    let read = [
        read_settings((config, bytes), empty).is_ok(),
        read_settings(empty, (config, bytes)).is_ok(),
        read_index(config, bytes).is_ok(),
    ];
    read.contains(&true)
}
