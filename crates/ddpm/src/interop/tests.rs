//! The readers alone: every kind of tensor, hostile files, and what we write ourselves.

use std::io::Cursor;
use std::path::Path;
use std::time::{Duration, Instant};

use super::file::{Content, Parts};
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
    let file = Parts::new(vec![file])?;
    let set = file.found.sets.first().ok_or("has no tensors")?;
    if let Some((name, why)) = set.unread.first() {
        return Err(format!("tensor {name} is {why}"));
    }
    let mut tensors = file.read(&set.tensors)?;
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
    refused(b"(ios\nsystem\n.", "would call os.system");
    refused(b"\x80\x04\x8c\x02os\x8c\x06system\x93)R.", "would call os.system");
    refused(b"(cos\nsystem\nS'x'\no.", "would call os.system");
    refused(b"\x80\x02cos\nsystem\n)\x81.", "would call os.system");
    refused(b"\x80\x04cos\nsystem\n)}\x92.", "would call os.system");
    // By way of others.
    refused(b"\x80\x02cfunctools\npartial\ncos\nsystem\n\x85R.", "would call os.system");
    refused(b"\x80\x02cshutil\nos.system\n)R.", "would call shutil.os.system");
    refused(b"\x80\x04\x8c\x09posixpath\x8c\x09os.system\x93)R.", "would call posixpath.os.system");
    refused(b"\x80\x02cbuiltins\ngetattr\ncposixpath\nos\n\x8c\x06system\x86R.", "would call posixpath.os");
    refused(b"\x80\x02cbuiltins\ngetattr\ncx\ny\n\x8c\x0b__globals__\x86R.", "would call builtins.getattr");
}

#[test]
fn names_and_objects_of_programs_are_inert_and_no_attack() {
    // An object, an array, a class, a function: none is weights, and none is run.
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
        assert_eq!(file.found.left_out, [(String::new(), name.to_owned())]);
        let error = super::read_bytes(Path::new("a.pth"), pickle, &super::Options::default())
            .unwrap_err()
            .to_string();
        let whole = format!("the whole file ({name})");
        assert!(error.contains(&whole) && error.contains("torch.save(model.state_dict(), FILE)"), "{error}");
        assert!(!error.contains("attack"), "{error}");
    }
}

#[test]
fn views_that_change_values_are_read_with_their_sign_and_attributes_change_none() {
    let expected = tensors(&golden("kinds/flags.safetensors")).unwrap();
    assert_eq!(expected.len(), 10);
    assert!(expected.iter().any(|t| t.name == "negative" && t.data[0] < 0.0));
    for file in ["kinds/flags.pth", "kinds/flags-legacy.pth"] {
        assert_eq!(tensors(&golden(file)).unwrap(), expected, "{file}");
    }
}

#[test]
fn every_argument_of_a_rebuild_is_honoured_or_refused() {
    let numbers: Vec<u8> = [1f32, -2.0, 3.0, 4.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    // What stands behind the strides: whether it needs a gradient, hooks, flags.
    let of = |rest: &str| {
        rebuilt(
            &format!(
                "_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQI0\n(I2\nt(I1\nt{rest}tR"
            ),
            &numbers,
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
    // Hooks are of gradients.
    assert_eq!(values("I01\n(S'1'\nctrainer\nhook\nd"), [1.0, -2.0]);
    for flag in [
        "(S'conj'\nI01\nd",
        "(S'neg'\nI2\nd",
        "(S'backend'\nI01\nd",
        "(I1\nI01\nd",
        "(S'neg'\nS'no'\nd",
        "S'neg'\n",
    ] {
        refused(&of(&format!("I00\n}}{flag}")), "a view with a flag that may change its values");
    }
    for odd in ["", "I00\n", "I7\n}", "S'x'\n}", "I00\nI00\n", "I00\n}}}"] {
        refused(&of(odd), "other arguments than PyTorch's");
    }
    let storage = "(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ";
    let tensor = format!("ctorch._utils\n_rebuild_tensor_v2\n({storage}I0\n(I2\nt(I1\ntI00\n}}tR");
    let call = |call: &str| rebuilt(call, &numbers);
    assert_eq!(
        tensors(&call(&format!("_rebuild_parameter\n({tensor}I01\n}}tR"))).unwrap()[0].data,
        [1.0, -2.0]
    );
    assert_eq!(
        tensors(&call(&format!("_rebuild_parameter_with_state\n({tensor}I01\n}}}}tR"))).unwrap()[0].data,
        [1.0, -2.0]
    );
    refused(
        &call(&format!("_rebuild_parameter\n({tensor}I01\n}}I1\nI1\ntR")),
        "other arguments than PyTorch's",
    );
    refused(&call(&format!("_rebuild_parameter\n({tensor}S'x'\n}}tR")), "other arguments than PyTorch's");
    // A state of its own, and kinds that are not read.
    refused(&call(&format!("_rebuild_parameter\n({tensor}I01\n}}tR}}b")), "made by code outside the file");
    for (function, why) in [
        ("_rebuild_sparse_tensor", "sparse, which is not read"),
        ("_rebuild_qtensor", "tensor.dequantize()"),
        ("_rebuild_nested_tensor", "nested"),
        ("_rebuild_meta_tensor_no_storage", "have no values"),
        ("_rebuild_tensor_v3", "of a dtype that is not read"),
        ("_rebuild_wrapper_subclass", "subclass of torch.Tensor"),
        ("_rebuild_from_2031", "made by code outside the file"),
    ] {
        refused(&call(&format!("{function}\n({storage}tR")), why);
    }
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
    // A module that is its own part, and one whose parts are many times the same.
    let own = b"\x80\x02c__main__\nM\n)\x81q\x00}X\x08\x00\x00\x00_modules}X\x01\x00\x00\x00ah\x00ssb.";
    refused(own, "too many dictionaries");
    refused(&[&b"\x80\x02"[..], &b"(".repeat(million), b"."].concat(), "a value that is not there");
    let list = [&b"\x80\x02](".to_vec()[..], &b"N".repeat(million), b"eq\x000cbuiltins\nset\nq\x01"].concat();
    refused(&[&list[..], &b"h\x01h\x00\x85R".repeat(1000), b"."].concat(), "copies lists without end");
    refused(&[&b"\x80\x02"[..], &b"N".repeat(5 << 20), b"."].concat(), "more than 4194304 commands");
    let long = [&b"\x80\x05\x8e"[..], &(65u64 << 20).to_le_bytes(), &vec![0; 65 << 20], b"."].concat();
    refused(&long, "more than 64 MiB");
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
    let call =
        format!("_rebuild_tensor_v2\n((S'storage'\nctorch\n{storage}\nS'0'\nS'cpu'\nI4\ntQ{call}I00\n}}tR");
    rebuilt(&call, numbers)
}

/// An archive with one tensor `w`, made by this call of a function of PyTorch's, and one storage.
fn rebuilt(call: &str, numbers: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let plain = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let pickle = format!("}}(S'w'\nctorch._utils\n{call}u.");
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
    zip.start_file("image.png", zip::write::SimpleFileOptions::default()).unwrap();
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
