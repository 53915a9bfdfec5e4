//! Checkpoints in the formats of training programs (`tools/golden/interop_kinds.py`): which weights are chosen, what
//! is skipped, and what is rejected with which error. All raw weights there are 1, all averaged ones 2.

use ddpm::checkpoint::{self, WeightsChoice};
use ddpm::config::{Config, Size};
use ddpm::interop::{Format, ImportOptions, Imported, Role, WeightSet, export, read, read_weights};
use ddpm::nets::NetworkKind;
use ddpm::schedule::ScheduleKind;
use std::fs;
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/interop/kinds").join(name)
}

fn small() -> ImportOptions {
    ImportOptions { size: Some(Size { height: 8, width: 8 }), ..ImportOptions::default() }
}

fn keyed(key: &str) -> ImportOptions {
    ImportOptions { key: Some(key.to_owned()), ..small() }
}

fn import(name: &str, options: &ImportOptions) -> Imported {
    read(&golden(name), options).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn assert_rejected(path: &Path, options: &ImportOptions, parts: &[&str]) -> String {
    let error = read(path, options).expect_err("must be rejected").to_string();
    assert!(parts.iter().all(|part| error.contains(part)), "{parts:?} are not in: {error}");
    error
}

/// The common value of all parameters.
fn value(read: &Imported) -> f32 {
    let first = read.weights.iter().find(|t| !t.data.is_empty()).expect("weights").data[0];
    let buffer = |name: &str| name.contains("running_") || name.ends_with("num_batches_tracked");
    let parameters = || read.weights.iter().filter(|t| !buffer(&t.name));
    assert!(parameters().count() > 20 && parameters().all(|t| t.data.iter().all(|&v| v == first)));
    first
}

#[test]
fn averages_are_found_by_structure_under_any_name() {
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
        let read = import(file, &small());
        assert_eq!((read.key.as_str(), read.role, value(&read)), (key, Role::Averaged, 2.0), "{file}");
        let mut found: Vec<&WeightSet> = read.others.iter().collect();
        found.sort_by_key(|s| others.iter().position(|o| *o == s.key));
        assert_eq!(found.iter().map(|s| s.key.as_str()).collect::<Vec<_>>(), others, "{file}");
        assert!(found.iter().all(|s| s.role == Role::Raw), "{file}: {found:?}");
        for other in others {
            let read = import(file, &keyed(other));
            assert_eq!((read.role, value(&read)), (Role::Raw, 1.0), "{file}, {other}");
        }
        // Initialising training from the file chooses the same weights.
        let weights = read_weights(&golden(file)).unwrap();
        assert!(
            weights.iter().any(|t| t.name == "conv0.weight" && t.data.iter().all(|&v| v == 2.0)),
            "{file}"
        );
    }
    // The common key of a pair selects its averaged weights.
    assert_eq!(import("ema-pytorch.pt", &keyed("ema")).key, "ema.ema_model.model");
    assert_eq!(import("ema-other-names.pt", &keyed("ema")).key, "ema.shadow");
}

#[test]
fn ambiguous_weights_require_a_key() {
    for (file, parts, choices) in [
        (
            "two-averages.pt",
            &["more than one is averaged: \"ema_0.99\" (averaged), \"ema_0.999\" (averaged)"][..],
            &[("ema_0.99", 2.0), ("model", 1.0)][..],
        ),
        (
            "two-networks.pt",
            &["the choice is ambiguous: \"first\" (weights), \"other\" (weights)"],
            &[("first", 1.0), ("other", 2.0)],
        ),
        (
            "unread-averages.pt",
            &["has averaged weights (ema.weights) in an unsupported format", "\"model\" (weights)"],
            &[("model", 1.0)],
        ),
        (
            "ema-not-begun.pt",
            &["that were never updated (initted is 0)", "\"ema.online_model\" (raw)"],
            &[("ema.ema_model", 2.0), ("ema.online_model", 1.0)],
        ),
    ] {
        let error = assert_rejected(&golden(file), &small(), parts);
        assert!(error.contains("ddpm import FILE --key NAME"), "{error}");
        for &(key, expected) in choices {
            assert_eq!(value(&import(file, &keyed(key))), expected, "{file}, {key}");
        }
        read_weights(&golden(file)).expect_err("ambiguous for training too");
    }
    let parts = [
        "a list of 30 unnamed tensors (shadow_params)",
        "give a file that also has the network's state_dict()",
    ];
    assert_rejected(&golden("shadow-params-alone.pt"), &small(), &parts);
}

#[test]
fn other_entries_of_training_checkpoints_are_skipped_and_listed() {
    for file in ["extras.pth", "extras-legacy.pth", "extras-protocol-4.pth"] {
        let read = import(file, &small());
        assert_eq!((read.key.as_str(), value(&read)), ("model", 1.0), "{file}");
        let note = read.notes.iter().find(|n| n.starts_with("skipped objects")).expect("a note");
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
        assert!(!note.contains("malicious"), "{note}");
        let tensors =
            read.notes.iter().find(|n| n.starts_with("skipped unsupported tensors")).expect("a note");
        for part in ["mask (a sparse tensor)", "spectrum (a complex tensor)", "tagged (a tensor subclass)"] {
            assert!(tensors.contains(part), "{file}: {part:?} is not in: {tensors}");
        }
    }
    let read = import("lit-ema.ckpt", &small());
    let note = "skipped objects that need code outside the file, which ddpm never executes: hyper_parameters.mode (trainer.Mode)";
    assert_eq!(read.notes, [note]);
}

#[test]
fn a_pickled_module_is_read_as_its_state_dict() {
    for file in ["module.pt", "module-legacy.pt"] {
        let read = import(file, &small());
        assert_eq!((read.key.as_str(), value(&read), &read.notes[..]), ("", 1.0, &[][..]), "{file}");
        assert_eq!(read.config.network.name, NetworkKind::Simple);
    }
}

#[test]
fn unsupported_weights_are_rejected_with_the_right_advice() {
    for (file, parts) in [
        ("sparse.pth", &["tensor conv0.weight is sparse", "tensor.to_dense()"][..]),
        ("quantized.pth", &["tensor output.weight is quantized", "tensor.dequantize()"]),
        (
            "pickled.pkl",
            &["stored in the format of pickle.dump", "torch.save(pickle.load(open(FILE, \"rb\")), NEW_FILE)"],
        ),
        ("overflow.pth", &["tensor output.bias has the value 1e300", "f32", "3.4028235e38"]),
        ("infinite-half.pth", &["tensor output.bias has 1 non-finite value", "65504"]),
        ("nan.pth", &["tensor output.bias has 1 non-finite value", "diverged"]),
    ] {
        let error = assert_rejected(&golden(file), &small(), parts);
        assert!(!error.contains("state_dict()") && !error.contains("gone wrong"), "{error}");
    }
    assert_rejected(&golden("arrays.pth"), &small(), &["it has no tensors", "conv0.weight (numpy.ndarray)"]);
}

#[test]
fn sharded_weights_are_read_completely() {
    for folder in ["shards", "shards-fp16", "shards-bin"] {
        let read = import(folder, &ImportOptions::default());
        assert_eq!((read.config.network.name, value(&read)), (NetworkKind::Unet2d, 1.0), "{folder}");
        let variant = folder == "shards-fp16";
        assert_eq!(
            read.notes.iter().any(|n| n == "the weights are of variant fp16"),
            variant,
            "{:?}",
            read.notes
        );
        let list = read.file.clone();
        assert_eq!(value(&import(list.to_str().unwrap(), &ImportOptions::default())), 1.0);
    }
    // A single shard, a missing one, and indices that point outside the folder.
    let one = golden("shards/diffusion_pytorch_model-00001-of-00004.safetensors");
    assert_rejected(
        &one,
        &small(),
        &["is one of 00004 weight shards", "diffusion_pytorch_model.safetensors.index.json"],
    );
    let folder = tempfile::tempdir().unwrap();
    let copy = |name: &str| fs::copy(golden("shards").join(name), folder.path().join(name)).unwrap();
    copy("config.json");
    copy("diffusion_pytorch_model-00001-of-00004.safetensors");
    assert_rejected(
        folder.path(),
        &small(),
        &["without their index (diffusion_pytorch_model.safetensors.index.json)"],
    );
    copy("diffusion_pytorch_model.safetensors.index.json");
    assert_rejected(
        folder.path(),
        &small(),
        &["00002-of-00004.safetensors", "is missing", "download it too"],
    );
    for (list, part) in [
        (r#"{"weight_map": {"a": "../x.safetensors"}}"#, "is not a file name in the same folder"),
        (r#"{"weight_map": {"a": "/etc/passwd"}}"#, "is not a file name in the same folder"),
        (r#"{"weight_map": {"a": ".."}}"#, "is not a file name in the same folder"),
        (r#"{"weight_map": {}}"#, "lists 0 weight files"),
        ("[]", "has no weight_map"),
    ] {
        fs::write(folder.path().join("diffusion_pytorch_model.safetensors.index.json"), list).unwrap();
        assert_rejected(folder.path(), &small(), &[part]);
    }
}

#[test]
fn averaged_weights_in_a_folder_are_preferred_and_their_absence_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let unet = golden("checkpoint-500/unet");
    let put = |name: &str| {
        let from = unet.join("diffusion_pytorch_model.safetensors");
        fs::copy(from, folder.path().join(name)).unwrap();
    };
    fs::copy(unet.join("config.json"), folder.path().join("config.json")).unwrap();
    put("diffusion_pytorch_model.non_ema.safetensors");
    let read_it = || read(folder.path(), &ImportOptions::default()).unwrap();
    assert!(
        read_it().notes.iter().any(|n| n.contains("these are raw weights (non_ema)")),
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
    // A checkpoint of diffusers' training script.
    let read = import("checkpoint-500", &ImportOptions::default());
    assert_eq!((read.key.as_str(), read.role, value(&read)), ("unet_ema", Role::Averaged, 2.0));
    assert_eq!(read.others, [WeightSet { key: "unet".into(), role: Role::Raw }]);
    let read =
        import("checkpoint-500", &ImportOptions { key: Some("unet".into()), ..ImportOptions::default() });
    assert_eq!((read.key.as_str(), read.role, value(&read)), ("unet", Role::Raw, 1.0));
}

/// A class-conditional network with non-default settings: its settings and checkpoint.
fn run_with_classes(folder: &Path, more: &[(&str, &str)]) -> (Config, PathBuf) {
    use ddpm::data::digits::Digits;
    use ddpm::train::Trainer;
    let mut pairs = vec![
        ("train.batch_size", "2"),
        ("optimizer.lr", "2e-3"),
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
fn exports_embed_settings_and_classes_so_nothing_is_assumed() {
    for (i, network) in NETWORKS.into_iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let (config, path) = run_with_classes(folder.path(), network);
        let classes = checkpoint::load_weights_only(&path, &WeightsChoice::Raw).unwrap().0.classes;
        let unknown = |mut config: Config| {
            config.data.path = ddpm::config::UNKNOWN_DATA.to_owned();
            config.network.im_size = config.data.size;
            config.network.im_channels = config.data.channels;
            config
        };
        for format in [Format::Safetensors, Format::Pytorch, Format::Diffusers] {
            let out = folder.path().join(format.file_name());
            if format == Format::Diffusers && i < 2 {
                continue;
            }
            export(&path, WeightsChoice::Auto, format, &out).unwrap();
            let again = folder.path().join("again").join(format.file_name());
            let back = read(&out, &ImportOptions::default()).unwrap();
            assert_eq!(back.assumed, [], "{format:?}");
            assert_eq!(back.classes, classes, "{format:?}");
            if format == Format::Diffusers {
                assert_eq!((&back.config.unet2d, &back.config.train), (&config.unet2d, &config.train));
                continue;
            }
            assert_eq!(back.notes, Vec::<String>::new());
            assert_eq!(back.config, unknown(config.clone()), "{format:?}");
            // Exports are reproducible and machine-independent.
            export(&path, WeightsChoice::Auto, format, &again).unwrap();
            let bytes = fs::read(&out).unwrap();
            assert!(bytes == fs::read(&again).unwrap());
            // Explicit options take precedence over embedded settings.
            let options = ImportOptions {
                overrides: vec![("diffusion.timesteps".into(), "50".into())],
                size: Some(Size { height: 16, width: 16 }),
                ..ImportOptions::default()
            };
            let overridden = read(&out, &options).unwrap();
            let timesteps = overridden.config.diffusion.timesteps;
            assert_eq!((timesteps, overridden.config.image_size()), (50, options.size));
            // Importing it as a run and exporting that preserves settings and classes.
            let run = back.save(folder.path(), Some(&format!("{i}-{format:?}"))).unwrap();
            let newest = checkpoint::newest(&run.checkpoints()).unwrap().unwrap().path;
            let third = folder.path().join("third").join(format.file_name());
            export(&newest, WeightsChoice::Auto, format, &third).unwrap();
            let third = read(&third, &ImportOptions::default()).unwrap();
            assert_eq!((third.config, third.classes), (unknown(config.clone()), classes.clone()));
        }
        // The weight file of a ddpm checkpoint has its settings next to it.
        let own = read(&path.join("model.safetensors"), &ImportOptions::default()).unwrap();
        assert_eq!((own.config, own.classes, own.assumed), (unknown(config), classes, Vec::new()));
    }
}

#[test]
fn invalid_embedded_settings_are_reported_and_the_network_is_detected() {
    let folder = tempfile::tempdir().unwrap();
    let (_, path) = run_with_classes(folder.path(), NETWORKS[1]);
    let out = folder.path().join("a.safetensors");
    export(&path, WeightsChoice::Auto, Format::Safetensors, &out).unwrap();
    let bytes = fs::read(&out).unwrap();
    let with = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at =
            bytes.windows(from.len()).position(|w| w == from.as_bytes()).expect("the text is in the file");
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
    assert!(read.notes[0].contains("class names in the file are ignored"), "{:?}", read.notes);
    assert_eq!((read.config.diffusion.timesteps, read.classes.len()), (77, 0));
}
