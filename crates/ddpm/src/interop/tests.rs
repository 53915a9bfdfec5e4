//! Tests of the readers alone: all kinds of tensors, malicious files, and files we write ourselves.

use std::io::Cursor;
use std::path::Path;
use std::time::{Duration, Instant};

use super::file::{Content, Parts};
use super::torch;
use crate::checkpoint::NamedTensor;

fn golden(name: &str) -> Vec<u8> {
    let path = format!("{}/tests/golden/interop/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// All tensors of the file's first state dict, sorted by name.
fn tensors(bytes: &[u8]) -> Result<Vec<NamedTensor>, String> {
    let content = Content::open(bytes)?;
    let file = content.parse()?;
    let file = Parts::new(vec![file])?;
    let set = file.found.sets.first().ok_or("has no tensors")?;
    if let Some((name, why)) = set.unsupported.first() {
        return Err(format!("tensor {name} is {why}"));
    }
    let mut tensors = file.read(&set.tensors)?;
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(tensors)
}

fn assert_rejected(bytes: &[u8], part: &str) {
    let reason = tensors(bytes).expect_err("must be rejected");
    assert!(reason.contains(part), "{part:?} is not in: {reason}");
}

#[test]
fn all_dtypes_and_views_are_read_in_all_formats() {
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
fn files_that_would_run_code_are_rejected_by_function_name() {
    for (name, call) in [
        // Python pickles os.system under its defining module.
        ("evil-zip.pth", "posix.system"),
        ("evil-legacy.pth", "__builtin__.eval"),
        ("evil-plain.pth", "os.system"),
        ("evil-protocol-4.pth", "posix.system"),
    ] {
        assert_rejected(
            &golden(name),
            &format!("would call {call} when loaded in Python: the file executes code"),
        );
    }
    assert_rejected(b"(ios\nsystem\n.", "would call os.system");
    assert_rejected(b"\x80\x04\x8c\x02os\x8c\x06system\x93)R.", "would call os.system");
    assert_rejected(b"(cos\nsystem\nS'x'\no.", "would call os.system");
    assert_rejected(b"\x80\x02cos\nsystem\n)\x81.", "would call os.system");
    assert_rejected(b"\x80\x04cos\nsystem\n)}\x92.", "would call os.system");
    // Indirect calls.
    assert_rejected(b"\x80\x02cfunctools\npartial\ncos\nsystem\n\x85R.", "would call os.system");
    assert_rejected(b"\x80\x02cshutil\nos.system\n)R.", "would call shutil.os.system");
    assert_rejected(b"\x80\x04\x8c\x09posixpath\x8c\x09os.system\x93)R.", "would call posixpath.os.system");
    assert_rejected(
        b"\x80\x02cbuiltins\ngetattr\ncposixpath\nos\n\x8c\x06system\x86R.",
        "would call posixpath.os",
    );
    assert_rejected(
        b"\x80\x02cbuiltins\ngetattr\ncx\ny\n\x8c\x0b__globals__\x86R.",
        "would call builtins.getattr",
    );
}

#[test]
fn foreign_globals_and_objects_are_inert_and_not_reported_as_malicious() {
    // An object, an array, a class, a function: none holds weights, and none is called.
    for (pickle, name) in [
        (&b"\x80\x02c__main__\nUnet\n)\x81}b."[..], "__main__.Unet"),
        (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n\x85R.", "numpy.ndarray"),
        (b"\x80\x02cnumpy._core.multiarray\nscalar\n)R.", "numpy.generic"),
        (
            b"\x80\x02ccopy_reg\n_reconstructor\ncargparse\nNamespace\nc__builtin__\nobject\nN\x87R.",
            "argparse.Namespace",
        ),
        (b"\x80\x02cos\nsystem\n.", "os.system"),
        (b"\x80\x02cos\nstat_result\n)R.", "os.stat_result"),
        (b"\x80\x02cpathlib\nPosixPath\nU\x01a\x85R.", "pathlib.PosixPath"),
        (b"(ilogging\nLogger\n.", "logging.Logger"),
        (b"\x80\x02ctorch\nQInt8Storage\n.", "torch.QInt8Storage"),
    ] {
        let content = Content::open(pickle).unwrap();
        let file = content.parse().unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(file.found.skipped, [(String::new(), name.to_owned())]);
        let error = super::read_bytes(Path::new("a.pth"), pickle, &super::ImportOptions::default())
            .unwrap_err()
            .to_string();
        let entry = format!("the whole file ({name})");
        assert!(error.contains(&entry) && error.contains("torch.save(model.state_dict(), FILE)"), "{error}");
        assert!(!error.contains("malicious"), "{error}");
    }
}

#[test]
fn negated_views_are_read_with_their_sign_and_attributes_are_ignored() {
    let expected = tensors(&golden("kinds/flags.safetensors")).unwrap();
    assert_eq!(expected.len(), 10);
    assert!(expected.iter().any(|t| t.name == "negative" && t.data[0] < 0.0));
    for file in ["kinds/flags.pth", "kinds/flags-legacy.pth"] {
        assert_eq!(tensors(&golden(file)).unwrap(), expected, "{file}");
    }
}

#[test]
fn rebuild_arguments_are_honoured_or_rejected() {
    let values_le: Vec<u8> = [1f32, -2.0, 3.0, 4.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    // The arguments after the strides: requires_grad, hooks, flags.
    let of = |rest: &str| {
        rebuilt(
            &format!(
                "_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQI0\n(I2\nt(I1\nt{rest}tR"
            ),
            &values_le,
        )
    };
    let values = |rest: &str| tensors(&of(rest)).unwrap()[0].data.clone();
    for plain in [
        "I00\n}",
        "I01\n}",
        "I00\n}N",
        "I00\n}}",
        "I00\n}(S'neg'\nI00\nd",
        "I00\n}(S'conj'\nI00\nS'neg'\nI00\nd",
    ] {
        assert_eq!(values(plain), [1.0, -2.0], "{plain}");
    }
    assert_eq!(values("I00\n}(S'neg'\nI01\nd"), [-1.0, 2.0]);
    // Hooks only affect gradients.
    assert_eq!(values("I01\n(S'1'\nctrainer\nhook\nd"), [1.0, -2.0]);
    for flag in [
        "(S'conj'\nI01\nd",
        "(S'neg'\nI2\nd",
        "(S'backend'\nI01\nd",
        "(I1\nI01\nd",
        "(S'neg'\nS'no'\nd",
        "S'neg'\n",
    ] {
        assert_rejected(&of(&format!("I00\n}}{flag}")), "a view with a flag that may change its values");
    }
    for odd in ["", "I00\n", "I7\n}", "S'x'\n}", "I00\nI00\n", "I00\n}}}"] {
        assert_rejected(&of(odd), "arguments that PyTorch never writes");
    }
    let storage = "(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ";
    let tensor = format!("ctorch._utils\n_rebuild_tensor_v2\n({storage}I0\n(I2\nt(I1\ntI00\n}}tR");
    let call = |call: &str| rebuilt(call, &values_le);
    assert_eq!(
        tensors(&call(&format!("_rebuild_parameter\n({tensor}I01\n}}tR"))).unwrap()[0].data,
        [1.0, -2.0]
    );
    assert_eq!(
        tensors(&call(&format!("_rebuild_parameter_with_state\n({tensor}I01\n}}}}tR"))).unwrap()[0].data,
        [1.0, -2.0]
    );
    assert_rejected(
        &call(&format!("_rebuild_parameter\n({tensor}I01\n}}I1\nI1\ntR")),
        "arguments that PyTorch never writes",
    );
    assert_rejected(
        &call(&format!("_rebuild_parameter\n({tensor}S'x'\n}}tR")),
        "arguments that PyTorch never writes",
    );
    // Attributes set on a tensor, and unsupported kinds.
    assert_rejected(
        &call(&format!("_rebuild_parameter\n({tensor}I01\n}}tR}}b")),
        "created by code outside the file",
    );
    for (function, why) in [
        ("_rebuild_sparse_tensor", "sparse, which is not supported"),
        ("_rebuild_qtensor", "tensor.dequantize()"),
        ("_rebuild_nested_tensor", "nested"),
        ("_rebuild_meta_tensor_no_storage", "have no values"),
        ("_rebuild_tensor_v3", "of an unsupported dtype"),
        ("_rebuild_wrapper_subclass", "torch.Tensor subclass"),
        ("_rebuild_from_2031", "created by code outside the file"),
    ] {
        assert_rejected(&call(&format!("{function}\n({storage}tR")), why);
    }
}

#[test]
fn truncated_files_are_rejected() {
    for name in ["tensors-legacy.pth", "tensors.pth", "tensors.safetensors"] {
        let bytes = golden(name);
        for length in 0..bytes.len() {
            assert!(tensors(&bytes[..length]).is_err(), "{name}, {length} bytes");
        }
    }
}

#[test]
fn parsing_takes_linear_time_and_memory() {
    let million = 1 << 20;
    let start = Instant::now();
    // Lists nested a million deep; a list that contains itself; a list copied into many sets.
    let deep = [&b"\x80\x02"[..], &b"]".repeat(million), &b"a".repeat(million - 1), b"."].concat();
    assert_rejected(&deep, "without tensors");
    assert_rejected(b"\x80\x02]q\x00h\x00a.", "without tensors");
    // A module that contains itself.
    let own = b"\x80\x02c__main__\nM\n)\x81q\x00}X\x08\x00\x00\x00_modules}X\x01\x00\x00\x00ah\x00ssb.";
    assert_rejected(own, "too many nested dictionaries");
    assert_rejected(&[&b"\x80\x02"[..], &b"(".repeat(million), b"."].concat(), "stack underflow");
    let list = [&b"\x80\x02](".to_vec()[..], &b"N".repeat(million), b"eq\x000cbuiltins\nset\nq\x01"].concat();
    assert_rejected(&[&list[..], &b"h\x01h\x00\x85R".repeat(1000), b"."].concat(), "copies lists too often");
    assert_rejected(&[&b"\x80\x02"[..], &b"N".repeat(5 << 20), b"."].concat(), "more than 4194304 opcodes");
    let long = [&b"\x80\x05\x8e"[..], &(65u64 << 20).to_le_bytes(), &vec![0; 65 << 20], b"."].concat();
    assert_rejected(&long, "more than 64 MiB");
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

#[test]
fn too_many_dictionaries_are_rejected_before_building_their_paths() {
    // If all entries were visited first, the tensor after them would be rejected for its name.
    let long = "w".repeat(600);
    let tensor = format!(
        "S'{long}'\nctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQI0\n(I1\nt(I1\nt\
         I00\n}}tR"
    );
    let of = |lists: usize| format!("}}({}{tensor}u.", "S'k'\n]".repeat(lists));
    assert_rejected(of(5).as_bytes(), "a name of more than 512 bytes");
    assert_rejected(of(5001).as_bytes(), "too many nested dictionaries");
}

#[test]
fn a_network_with_huge_channel_counts_is_rejected() {
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
        super::read_bytes(Path::new("a.safetensors"), &bytes, &super::ImportOptions::default()).unwrap_err();
    assert!(error.to_string().contains("unet2d.block_out_channels"), "{error}");
}

/// An archive with one tensor `w` in a storage of four elements.
fn one_tensor(call: &str, storage: &str, values_le: &[u8]) -> Vec<u8> {
    let call =
        format!("_rebuild_tensor_v2\n((S'storage'\nctorch\n{storage}\nS'0'\nS'cpu'\nI4\ntQ{call}I00\n}}tR");
    rebuilt(&call, values_le)
}

/// An archive with one storage and one tensor `w`, rebuilt by the given call of a PyTorch function.
fn rebuilt(call: &str, values_le: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let plain = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let pickle = format!("}}(S'w'\nctorch._utils\n{call}u.");
    for (name, content) in [("a/data.pkl", pickle.as_bytes()), ("a/data/0", values_le)] {
        zip.start_file(name, plain).unwrap();
        zip.write_all(content).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

#[test]
fn sizes_are_checked_before_allocating() {
    let values_le: Vec<u8> = [1f32, 2.0, 3.0, 4.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    let of = |call| one_tensor(call, "FloatStorage", &values_le);
    let good = tensors(&of("I1\n(I2\nt(I2\nt")).unwrap();
    assert_eq!(good[0], NamedTensor { name: "w".into(), shape: vec![2], data: vec![2.0, 4.0] });
    assert!(
        tensors(&of("I4\n(I0\nt(I1\nt")).unwrap()[0].data.is_empty(),
        "an empty tensor may have any offset"
    );
    assert_rejected(&of("I2\n(I2\nt(I2\nt"), "tensor w extends past the end of its storage");
    assert_rejected(&of("I0\n(I2\nt(I9223372036854775807\nt"), "extends past");
    assert_rejected(&of("I9223372036854775807\n(I2\nt(I2\nt"), "extends past");
    assert_rejected(
        &of("I0\n(I1000000000000\nt(I0\nt"),
        "expanded views, or the file is a decompression bomb",
    );
    assert_rejected(&of("I0\n(I4294967296\nI4294967296\nI2\nt(I0\nI0\nI0\nt"), "decompression bomb");
    assert_rejected(&of("I0\n(I-1\nt(I1\nt"), "negative");
    assert_rejected(&of("I0\n(I1\nt(I-1\nt"), "negative");
    assert_rejected(&of("I0\n(I1\nI1\nt(I1\nt"), "do not match");
    assert_rejected(
        &one_tensor("I0\n(I1\nt(I1\nt", "FloatStorage", &values_le[..12]),
        "fewer elements than declared",
    );
    assert_rejected(
        &one_tensor("I0\n(I1\nt(I1\nt", "DoubleStorage", &values_le),
        "fewer elements than declared",
    );
}

#[test]
fn other_file_formats_are_named_in_the_error() {
    assert_rejected(b"", "is empty");
    assert_rejected(b"hello, world, this is text", "neither a PyTorch file");
    assert_rejected(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull");
    assert_rejected(b"\x80\x02}.", "a pickle without tensors");
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    zip.start_file("image.png", zip::write::SimpleFileOptions::default()).unwrap();
    assert_rejected(&zip.finish().unwrap().into_inner(), "not a PyTorch file: it has no data.pkl");
}

#[test]
fn written_files_round_trip_bit_exactly() {
    // More than one batch of items, a counter, an empty tensor, and unusual values.
    let odd = [f32::MIN_POSITIVE / 4.0, -0.0, f32::MAX, 1.0 / 3.0].to_vec();
    let mut all: Vec<NamedTensor> = (0..1100)
        .map(|i| NamedTensor { name: format!("t{i:04}"), shape: vec![1], data: vec![i as f32] })
        .collect();
    all.push(NamedTensor { name: "u.odd".into(), shape: vec![2, 1, 2], data: odd });
    all.push(NamedTensor { name: "v.num_batches_tracked".into(), shape: vec![], data: vec![1234.0] });
    all.push(NamedTensor { name: "w.empty".into(), shape: vec![0, 3], data: vec![] });
    let write = || {
        let mut out = Cursor::new(Vec::new());
        torch::write(&mut out, "model", &all, &[("ddpm/config.toml", "text")]).unwrap();
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
