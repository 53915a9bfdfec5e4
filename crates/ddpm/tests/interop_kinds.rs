//! Checkpoints as training programs leave them (`tools/golden/interop_kinds.py`): which weights are taken, what is left out,
//! what is refused and how. All raw weights there are 1, all averaged ones 2.

use ddpm::interop::{Format, Imported, Options, Role, WeightSet, export, read, read_weights};
use ddpm::train::checkpoint::{self, Which};
use ddpm::train::config::{Config, NetworkKind, ScheduleKind, Size};
use std::fs;
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/interop/kinds").join(name)
}

fn small() -> Options {
    Options { size: Some(Size { height: 8, width: 8 }), ..Options::default() }
}

fn keyed(key: &str) -> Options {
    Options { key: Some(key.to_owned()), ..small() }
}

fn taken(name: &str, options: &Options) -> Imported {
    read(&golden(name), options).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn refused(path: &Path, options: &Options, parts: &[&str]) -> String {
    let error = read(path, options).expect_err("it is refused").to_string();
    assert!(parts.iter().all(|part| error.contains(part)), "{parts:?} are not in: {error}");
    error
}

/// The value that all of the parameters have.
fn value(read: &Imported) -> f32 {
    let first = read.weights.iter().find(|t| !t.data.is_empty()).expect("weights").data[0];
    let buffer = |name: &str| name.contains("running_") || name.ends_with("num_batches_tracked");
    let parameters = || read.weights.iter().filter(|t| !buffer(&t.name));
    assert!(parameters().count() > 20 && parameters().all(|t| t.data.iter().all(|&v| v == first)));
    first
}

#[test]
fn averages_are_found_by_structure_whatever_they_are_called() {
    for (file, key, others) in [
        ("ema-pytorch.pt", "ema.ema_model.model", &["model.model", "ema.online_model.model"][..]),
        ("ema-other-names.pt", "ema.shadow", &["model", "ema.net"]),
        ("averaged-model.pt", "second.module", &["model"]),
        ("shadow-params.pt", "ema.shadow_params", &["model"]),
        ("shadow-params-and-collected.pt", "ema.shadow_params", &["model", "ema.collected_params"]),
        ("lit-ema.ckpt", "state_dict.model_ema", &["state_dict.model.diffusion_model"]),
        ("object.pt", "ema.shadow", &["model"]),
        ("module-averaged.pt", "ema", &["model"]),
    ] {
        let read = taken(file, &small());
        assert_eq!((read.key.as_str(), read.role, value(&read)), (key, Role::Averaged, 2.0), "{file}");
        let mut found: Vec<&WeightSet> = read.others.iter().collect();
        found.sort_by_key(|s| others.iter().position(|o| *o == s.key));
        assert_eq!(found.iter().map(|s| s.key.as_str()).collect::<Vec<_>>(), others, "{file}");
        assert!(found.iter().all(|s| s.role == Role::Raw), "{file}: {found:?}");
        for other in others {
            let read = taken(file, &keyed(other));
            assert_eq!((read.role, value(&read)), (Role::Raw, 1.0), "{file}, {other}");
        }
        // A training that begins with them takes the same.
        let weights = read_weights(&golden(file)).unwrap();
        assert!(
            weights.iter().any(|t| t.name == "conv0.weight" && t.data.iter().all(|&v| v == 2.0)),
            "{file}"
        );
    }
    // The half of a pair that its common key means is its averaged one.
    assert_eq!(taken("ema-pytorch.pt", &keyed("ema")).key, "ema.ema_model.model");
    assert_eq!(taken("ema-other-names.pt", &keyed("ema")).key, "ema.shadow");
}

#[test]
fn weights_that_nobody_can_know_to_be_meant_are_asked_for_by_key() {
    for (file, parts, choices) in [
        (
            "two-averages.pt",
            &["more than one is averaged: \"ema_0.99\" (averaged), \"ema_0.999\" (averaged)"][..],
            &[("ema_0.99", 2.0), ("model", 1.0)][..],
        ),
        (
            "two-networks.pt",
            &["which one is meant is not clear: \"first\" (weights), \"other\" (weights)"],
            &[("first", 1.0), ("other", 2.0)],
        ),
        (
            "unread-averages.pt",
            &["has averaged weights (ema.weights) in a form that is not read", "\"model\" (weights)"],
            &[("model", 1.0)],
        ),
        (
            "ema-not-begun.pt",
            &["into which nothing was averaged yet (initted is 0)", "\"ema.online_model\" (raw)"],
            &[("ema.ema_model", 2.0), ("ema.online_model", 1.0)],
        ),
    ] {
        let error = refused(&golden(file), &small(), parts);
        assert!(error.contains("ddpm import FILE --key NAME"), "{error}");
        for &(key, expected) in choices {
            assert_eq!(value(&taken(file, &keyed(key))), expected, "{file}, {key}");
        }
        read_weights(&golden(file)).expect_err("neither can a training know");
    }
    let parts = ["a list of 30 tensors without names (shadow_params)", "state_dict() as well"];
    refused(&golden("shadow-params-alone.pt"), &small(), &parts);
}

#[test]
fn what_a_training_program_keeps_beside_the_weights_is_left_out_by_its_entry() {
    for file in ["extras.pth", "extras-legacy.pth", "extras-protocol-4.pth"] {
        let read = taken(file, &small());
        assert_eq!((read.key.as_str(), value(&read)), ("model", 1.0), "{file}");
        let note = read.notes.iter().find(|n| n.starts_with("left out")).expect("a note");
        for part in [
            "best_loss (numpy.generic)",
            "losses (numpy.ndarray)",
            "args (argparse.Namespace)",
            "hyper_parameters.loss_fn (torch.nn.functional.mse_loss)",
            "hyper_parameters.mode (trainer.Mode)",
            " more",
        ] {
            assert!(note.contains(part), "{file}: {part:?} is not in: {note}");
        }
        assert!(!note.contains("attack"), "{note}");
        let tensors = read.notes.iter().find(|n| n.starts_with("left out, being")).expect("a note");
        for part in
            ["mask (a sparse tensor)", "spectrum (a complex tensor)", "tagged (a tensor of a subclass)"]
        {
            assert!(tensors.contains(part), "{file}: {part:?} is not in: {tensors}");
        }
    }
    let read = taken("lit-ema.ckpt", &small());
    let note = "left out, as ddpm runs no code that could make them: hyper_parameters.mode (trainer.Mode)";
    assert_eq!(read.notes, [note]);
}

#[test]
fn a_whole_module_is_read_as_its_state_dict() {
    for file in ["module.pt", "module-legacy.pt"] {
        let read = taken(file, &small());
        assert_eq!((read.key.as_str(), value(&read), &read.notes[..]), ("", 1.0, &[][..]), "{file}");
        assert_eq!(read.config.network.name, NetworkKind::Simple);
    }
}

#[test]
fn weights_that_are_not_read_say_why_and_never_a_cure_that_was_done() {
    for (file, parts) in [
        ("sparse.pth", &["tensor conv0.weight is sparse", "tensor.to_dense()"][..]),
        ("quantized.pth", &["tensor output.weight is quantized", "tensor.dequantize()"]),
        (
            "pickled.pkl",
            &["which pickle.dump writes", "torch.save(pickle.load(open(FILE, \"rb\")), NEW_FILE)"],
        ),
        ("overflow.pth", &["tensor output.bias has the value 1e300", "f32", "3.4028235e38"]),
        ("infinite-half.pth", &["tensor output.bias has 1 value that is not finite", "65504"]),
        ("nan.pth", &["tensor output.bias has 1 value that is not finite", "diverged"]),
    ] {
        let error = refused(&golden(file), &small(), parts);
        assert!(!error.contains("state_dict()") && !error.contains("gone wrong"), "{error}");
    }
    refused(&golden("arrays.pth"), &small(), &["it has no tensors", "conv0.weight (numpy.ndarray)"]);
}

#[test]
fn folders_with_weights_in_several_files_are_read_whole() {
    for folder in ["shards", "shards-fp16", "shards-bin"] {
        let read = taken(folder, &Options::default());
        assert_eq!((read.config.network.name, value(&read)), (NetworkKind::Unet2d, 1.0), "{folder}");
        let variant = folder == "shards-fp16";
        assert_eq!(
            read.notes.iter().any(|n| n == "the weights are the variant fp16"),
            variant,
            "{:?}",
            read.notes
        );
        let list = read.file.clone();
        assert_eq!(value(&taken(list.to_str().unwrap(), &Options::default())), 1.0);
    }
    // One of them, one that is missing, and lists that lead elsewhere.
    let one = golden("shards/diffusion_pytorch_model-00001-of-00004.safetensors");
    refused(&one, &small(), &["is one of 00004 files", "diffusion_pytorch_model.safetensors.index.json"]);
    let folder = tempfile::tempdir().unwrap();
    let copy = |name: &str| fs::copy(golden("shards").join(name), folder.path().join(name)).unwrap();
    copy("config.json");
    copy("diffusion_pytorch_model-00001-of-00004.safetensors");
    refused(folder.path(), &small(), &["not their list (diffusion_pytorch_model.safetensors.index.json)"]);
    copy("diffusion_pytorch_model.safetensors.index.json");
    refused(folder.path(), &small(), &["00002-of-00004.safetensors", "is missing", "fetch it as well"]);
    for (list, part) in [
        (r#"{"weight_map": {"a": "../x.safetensors"}}"#, "is no name of a file beside it"),
        (r#"{"weight_map": {"a": "/etc/passwd"}}"#, "is no name of a file beside it"),
        (r#"{"weight_map": {"a": ".."}}"#, "is no name of a file beside it"),
        (r#"{"weight_map": {}}"#, "lists 0 files"),
        ("[]", "has no weight_map"),
    ] {
        fs::write(folder.path().join("diffusion_pytorch_model.safetensors.index.json"), list).unwrap();
        refused(folder.path(), &small(), &[part]);
    }
}

#[test]
fn a_folder_without_averaged_weights_says_so_and_one_with_both_takes_them() {
    let folder = tempfile::tempdir().unwrap();
    let unet = golden("checkpoint-500/unet");
    let put = |name: &str| {
        let from = unet.join("diffusion_pytorch_model.safetensors");
        fs::copy(from, folder.path().join(name)).unwrap();
    };
    fs::copy(unet.join("config.json"), folder.path().join("config.json")).unwrap();
    put("diffusion_pytorch_model.non_ema.safetensors");
    let read_it = || read(folder.path(), &Options::default()).unwrap();
    assert!(
        read_it().notes.iter().any(|n| n.contains("are not the averaged ones (non_ema)")),
        "{:?}",
        read_it().notes
    );
    put("diffusion_pytorch_model.safetensors");
    let read = read_it();
    assert!(read.file.ends_with("diffusion_pytorch_model.safetensors"));
    assert!(
        read.notes.iter().any(|n| n.contains("also in the folder") && n.contains("non_ema")),
        "{:?}",
        read.notes
    );
    // What diffusers' training leaves.
    let read = taken("checkpoint-500", &Options::default());
    assert_eq!((read.key.as_str(), read.role, value(&read)), ("unet_ema", Role::Averaged, 2.0));
    assert_eq!(read.others, [WeightSet { key: "unet".into(), role: Role::Raw }]);
    let read = taken("checkpoint-500", &Options { key: Some("unet".into()), ..Options::default() });
    assert_eq!((read.key.as_str(), read.role, value(&read)), ("unet", Role::Raw, 1.0));
}

/// A run of a network with classes and settings of its own, and its newest checkpoint.
fn run_with_classes(folder: &Path, more: &[(&str, &str)]) -> (Config, PathBuf) {
    use ddpm::data::digits::Digits;
    use ddpm::train::Trainer;
    let mut pairs = vec![
        ("train.batch_size", "2"),
        ("train.lr", "2e-3"),
        ("diffusion.timesteps", "77"),
        ("diffusion.schedule", "cosine"),
        ("diffusion.prediction", "v"),
        ("train.label_dropout", "0.25"),
        ("sampling.threshold", "dynamic"),
    ];
    pairs.extend(more);
    let pairs: Vec<_> = pairs.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
    let config = Config::load(Some("digits"), None, &pairs).unwrap();
    let trainer = Trainer::new(&config, Box::new(Digits::new(0, 16, 10).unwrap())).unwrap();
    let mut checkpoint = trainer.checkpoint(None).unwrap();
    checkpoint.manifest.classes = (0..10).map(|i| format!("digit {i}, \"quoted\"")).collect();
    let path = checkpoint::save(&folder.join("checkpoints"), &checkpoint).unwrap();
    (checkpoint.manifest.config(&path).unwrap(), path)
}

const NETWORKS: [&[(&str, &str)]; 3] = [
    &[
        ("network.name", "attention"),
        ("attention.down_channels", "8,16"),
        ("attention.mid_channels", "16,8"),
        ("attention.down_sample", "true"),
        ("attention.num_heads", "2"),
        ("attention.num_class_embeds", "10"),
    ],
    &[("network.name", "simple"), ("simple.widths", "4,8"), ("simple.num_class_embeds", "10")],
    &[
        ("network.name", "unet2d"),
        ("unet2d.block_out_channels", "16,16,16,16"),
        ("unet2d.norm_num_groups", "4"),
        ("unet2d.norm_eps", "1e-4"),
        ("unet2d.num_class_embeds", "10"),
    ],
];

#[test]
fn our_own_exports_carry_their_settings_and_classes_and_nothing_is_assumed() {
    for (i, network) in NETWORKS.into_iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let (config, path) = run_with_classes(folder.path(), network);
        let classes = checkpoint::load_weights_only(&path, &Which::Raw).unwrap().0.classes;
        let unknown = |mut config: Config| {
            config.data.path = ddpm::interop::UNKNOWN_DATA.to_owned();
            config.network.im_size = config.data.size;
            config.network.im_channels = config.data.channels;
            config
        };
        for format in [Format::Safetensors, Format::Pytorch, Format::Diffusers] {
            let out = folder.path().join(format.file_name());
            if format == Format::Diffusers && i < 2 {
                continue;
            }
            export(&path, Which::Auto, format, &out).unwrap();
            let again = folder.path().join("again").join(format.file_name());
            let back = read(&out, &Options::default()).unwrap();
            assert_eq!(back.assumed, [], "{format:?}");
            assert_eq!(back.classes, classes, "{format:?}");
            if format == Format::Diffusers {
                assert_eq!((&back.config.unet2d, &back.config.train), (&config.unet2d, &config.train));
                continue;
            }
            assert_eq!(back.notes, Vec::<String>::new());
            assert_eq!(back.config, unknown(config.clone()), "{format:?}");
            // The same bytes each time; nothing of this machine.
            export(&path, Which::Auto, format, &again).unwrap();
            let bytes = fs::read(&out).unwrap();
            assert!(bytes == fs::read(&again).unwrap());
            // What is said counts more than what is in the file.
            let options = Options {
                overrides: vec![("diffusion.timesteps".into(), "50".into())],
                size: Some(Size { height: 16, width: 16 }),
                ..Options::default()
            };
            let told = read(&out, &options).unwrap();
            assert_eq!((told.config.diffusion.timesteps, told.config.image_size()), (50, options.size));
            // A run of it exports the same settings and classes again.
            let run = back.save(folder.path(), Some(&format!("{i}-{format:?}"))).unwrap();
            let newest = checkpoint::newest(&run.checkpoints()).unwrap().unwrap().path;
            let third = folder.path().join("third").join(format.file_name());
            export(&newest, Which::Auto, format, &third).unwrap();
            let third = read(&third, &Options::default()).unwrap();
            assert_eq!((third.config, third.classes), (unknown(config.clone()), classes.clone()));
        }
        // The checkpoint's own file has its settings beside it.
        let own = read(&path.join("model.safetensors"), &Options::default()).unwrap();
        assert_eq!((own.config, own.classes, own.assumed), (unknown(config), classes, Vec::new()));
    }
}

#[test]
fn settings_in_a_file_that_cannot_be_used_are_told_and_the_tensors_are_recognised() {
    let folder = tempfile::tempdir().unwrap();
    let (_, path) = run_with_classes(folder.path(), NETWORKS[1]);
    let out = folder.path().join("a.safetensors");
    export(&path, Which::Auto, Format::Safetensors, &out).unwrap();
    let bytes = fs::read(&out).unwrap();
    let with = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).expect("it is there");
        let mut changed = bytes.clone();
        changed[at..at + to.len()].copy_from_slice(to.as_bytes());
        ddpm::interop::read_bytes(&out, &changed, &small()).unwrap()
    };
    for (from, to, part) in [
        ("timesteps = 77", "timestepz = 77", "timestepz"),
        ("timesteps = 77", "timesteps = -7", "timesteps"),
        ("name = \\\"simple\\\"", "name = \\\"unet2d\\\"", "another network than its tensors"),
    ] {
        let read = with(from, to);
        assert!(read.notes.iter().any(|n| n.contains(part)), "{part:?} is not in {:?}", read.notes);
        assert!(read.assumed.iter().any(|a| a.key == "diffusion.timesteps"));
        assert_eq!(read.config.diffusion.schedule, ScheduleKind::Linear);
    }
    let read = with("digit 0, ", "digit\\\\n ");
    assert!(read.notes[0].contains("names of the classes in the file are left out"), "{:?}", read.notes);
    assert_eq!((read.config.diffusion.timesteps, read.classes.len()), (77, 0));
}
