//! The readers alone: every kind of tensor, hostile files, and what we write ourselves.

use std::io::Cursor;
use std::path::Path;
use std::time::{Duration, Instant};

use super::file::Content;
use super::torch;
use crate::train::checkpoint::NamedTensor;

fn golden(name: &str) -> Vec<u8> {
    let path = format!("{}/tests/golden/interop/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// All tensors of the file's first set, in the order of their names.
fn tensors(bytes: &[u8]) -> Result<Vec<NamedTensor>, String> {
    let content = Content::open(bytes)?;
    let file = content.parse()?;
    let set = file.sets.first().ok_or("has no tensors")?;
    let mut tensors = file.read(&set.tensors, str::to_owned)?;
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(tensors)
}

fn refused(bytes: &[u8], part: &str) {
    let reason = tensors(bytes).expect_err("it is refused");
    assert!(reason.contains(part), "{part:?} is not in: {reason}");
}

#[test]
fn every_kind_of_number_and_view_is_read_in_every_format() {
    let dense = tensors(&golden("tensors.safetensors")).unwrap();
    assert_eq!(dense.len(), 19);
    for name in [
        "tensors.pth",
        "tensors-legacy.pth",
        "tensors-protocol-3.pth",
        "tensors-protocol-4.pth",
        "tensors-protocol-5.pth",
    ] {
        let read = tensors(&golden(name)).unwrap();
        for (read, dense) in read.iter().zip(&dense) {
            assert_eq!(read, dense, "{name}");
        }
        assert_eq!(read.len(), dense.len(), "{name}");
    }
}

#[test]
fn files_that_would_run_code_are_refused_by_the_name_of_it() {
    for (name, call) in [
        // Python knows os.system by the module that it is made in.
        ("evil-zip.pth", "posix.system"),
        ("evil-legacy.pth", "__builtin__.eval"),
        ("evil-plain.pth", "os.system"),
        ("evil-protocol-4.pth", "posix.system"),
    ] {
        refused(
            &golden(name),
            &format!("would call {call} when Python loads it: the file runs code of its own"),
        );
    }
    refused(
        b"\x80\x02c__main__\nUnet\n)\x81}b.",
        "needs __main__.Unet, which only code outside the file could make",
    );
    refused(b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R.", "numpy.core.multiarray._reconstruct");
    refused(b"(ios\nsystem\n.", "would call os.system");
    refused(b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "would call os.system");
    refused(b"\x80\x02ctorch\nQInt8Storage\n.", "QInt8Storage");
}

#[test]
fn whatever_is_cut_off_is_refused() {
    for name in ["tensors-legacy.pth", "tensors.pth", "tensors.safetensors"] {
        let whole = golden(name);
        for length in 0..whole.len() {
            assert!(tensors(&whole[..length]).is_err(), "{name}, {length} bytes");
        }
    }
}

#[test]
fn what_a_pickle_does_takes_time_and_memory_in_its_length() {
    let million = 1 << 20;
    let start = Instant::now();
    // A list in a list, a million deep; a list that is its own item; a list copied into set after set.
    let deep = [&b"\x80\x02"[..], &b"]".repeat(million), &b"a".repeat(million - 1), b"."].concat();
    refused(&deep, "without tensors");
    refused(b"\x80\x02]q\x00h\x00a.", "without tensors");
    refused(&[&b"\x80\x02"[..], &b"(".repeat(million), b"."].concat(), "a value that is not there");
    let list = [&b"\x80\x02](".to_vec()[..], &b"N".repeat(million), b"eq\x000cbuiltins\nset\nq\x01"].concat();
    refused(&[&list[..], &b"h\x01h\x00\x85R".repeat(1000), b"."].concat(), "copies lists without end");
    refused(&[&b"\x80\x02"[..], &b"N".repeat(5 << 20), b"."].concat(), "more than 4 MiB");
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

#[test]
fn too_many_dictionaries_are_refused_before_their_places_are_written_down() {
    // The tensor behind them would be refused for its name, were all of them looked at first.
    let long = "w".repeat(600);
    let tensor = format!(
        "S'{long}'\nctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQI0\n(I1\nt(I1\nt\
         I00\n}}tR"
    );
    let of = |lists: usize| format!("}}({}{tensor}u.", "S'k'\n]".repeat(lists));
    refused(of(5).as_bytes(), "a name of more than 512 bytes");
    refused(of(5001).as_bytes(), "too many dictionaries inside one another");
}

#[test]
fn a_network_of_endless_channels_is_refused() {
    let empty = |name: &str, shape: [usize; 2]| {
        format!(r#""{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[0,0]}}"#)
    };
    let tensors = [
        empty("conv_in.weight", [0, 1]),
        empty("time_embedding.linear_1.weight", [0, 1]),
        empty("down_blocks.0.resnets.0.conv1.weight", [usize::MAX, 0]),
        empty("down_blocks.0.resnets.0.time_emb_proj.weight", [1, 0]),
    ];
    let header = format!("{{{}}}", tensors.join(","));
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    let error =
        super::read_bytes(Path::new("a.safetensors"), &bytes, &super::Options::default()).unwrap_err();
    assert!(error.to_string().contains("unet2d.block_out_channels"), "{error}");
}

/// An archive with one tensor `w` in a storage of four numbers.
fn one_tensor(call: &str, storage: &str, numbers: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let plain = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let pickle = format!(
        "}}(S'w'\nctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\n{storage}\nS'0'\nS'cpu'\nI4\ntQ{call}I00\n}}tRu."
    );
    for (name, content) in [("a/data.pkl", pickle.as_bytes()), ("a/data/0", numbers)] {
        zip.start_file(name, plain).unwrap();
        zip.write_all(content).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

#[test]
fn sizes_are_checked_before_memory_is_taken() {
    let numbers: Vec<u8> = [1f32, 2.0, 3.0, 4.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    let of = |call| one_tensor(call, "FloatStorage", &numbers);
    let good = tensors(&of("I1\n(I2\nt(I2\nt")).unwrap();
    assert_eq!(good[0], NamedTensor { name: "w".into(), shape: vec![2], data: vec![2.0, 4.0] });
    assert!(tensors(&of("I4\n(I0\nt(I1\nt")).unwrap()[0].data.is_empty(), "nothing reaches nowhere");
    refused(&of("I2\n(I2\nt(I2\nt"), "tensor w reaches behind the end of its storage");
    refused(&of("I0\n(I2\nt(I9223372036854775807\nt"), "reaches behind");
    refused(&of("I9223372036854775807\n(I2\nt(I2\nt"), "reaches behind");
    refused(&of("I0\n(I1000000000000\nt(I0\nt"), "expanded views, or it is a bomb");
    refused(&of("I0\n(I4294967296\nI4294967296\nI2\nt(I0\nI0\nI0\nt"), "a bomb");
    refused(&of("I0\n(I-1\nt(I1\nt"), "negative");
    refused(&of("I0\n(I1\nt(I-1\nt"), "negative");
    refused(&of("I0\n(I1\nI1\nt(I1\nt"), "do not fit");
    refused(&one_tensor("I0\n(I1\nt(I1\nt", "FloatStorage", &numbers[..12]), "fewer numbers than it says");
    refused(&one_tensor("I0\n(I1\nt(I1\nt", "DoubleStorage", &numbers), "fewer numbers than it says");
}

#[test]
fn other_files_are_named_for_what_they_are() {
    refused(b"", "is empty");
    refused(b"hello, world, this is text", "neither a file of PyTorch's");
    refused(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull");
    refused(b"\x80\x02}.", "a pickle without tensors");
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    zip.start_file("picture.png", zip::write::SimpleFileOptions::default()).unwrap();
    refused(&zip.finish().unwrap().into_inner(), "none of PyTorch's: it has no data.pkl");
}

#[test]
fn what_we_write_we_read_to_the_bit() {
    // More than one batch of a pickle's command, a scalar, an empty one, a counter, and numbers of every kind.
    let odd = [f32::MIN_POSITIVE / 4.0, -0.0, f32::MAX, 1.0 / 3.0].to_vec();
    let mut all: Vec<NamedTensor> = (0..1100)
        .map(|i| NamedTensor { name: format!("t{i:04}"), shape: vec![1], data: vec![i as f32] })
        .collect();
    all.push(NamedTensor { name: "u.odd".into(), shape: vec![2, 1, 2], data: odd });
    all.push(NamedTensor { name: "v.num_batches_tracked".into(), shape: vec![], data: vec![1234.0] });
    all.push(NamedTensor { name: "w.empty".into(), shape: vec![0, 3], data: vec![] });
    let write = || {
        let mut out = Cursor::new(Vec::new());
        torch::write(&mut out, "model", &all).unwrap();
        out.into_inner()
    };
    let bytes = write();
    assert_eq!(bytes, write());
    let read = tensors(&bytes).unwrap();
    assert_eq!(read.len(), all.len());
    for (read, all) in read.iter().zip(&all) {
        let bits = |t: &NamedTensor| t.data.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!((&read.name, &read.shape, bits(read)), (&all.name, &all.shape, bits(all)));
    }
}
