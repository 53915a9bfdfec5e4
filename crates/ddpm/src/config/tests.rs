use super::*;
use crate::nets::{BlockType, NetworkKind};
use crate::schedule::ScheduleKind;
use std::path::PathBuf;

/// DDPM-Pytorch's `config/default.yaml`, verbatim.
const TUTORIAL: &str = include_str!("../../tests/fixtures/ddpm-pytorch.yaml");

fn file(name: &str, text: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, text).unwrap();
    (folder, path)
}

fn load_file(name: &str, text: &str) -> Result<Loaded> {
    let (_folder, path) = file(name, text);
    Config::load_with_notes(None, Some(&path), &[])
}

/// The message without the path.
fn file_error(name: &str, text: &str) -> String {
    let message = load_file(name, text).unwrap_err().to_string();
    let (path, reason) = message.split_once(": ").unwrap();
    assert!(path.ends_with(name), "{message}");
    reason.to_owned()
}

fn set(pairs: &[(&str, &str)]) -> Result<Config> {
    let pairs: Vec<_> = pairs.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
    Config::load(Some("mnist"), None, &pairs)
}

fn set_error(key: &str, value: &str) -> String {
    set(&[(key, value)]).unwrap_err().to_string()
}

#[test]
fn presets_can_be_selected_by_their_earlier_names() {
    for (before, now) in RENAMED_PRESETS {
        let load = |name: &str| Config::load(Some(name), None, &[]).unwrap();
        assert_eq!(load(before), load(now));
    }
}

#[test]
fn every_preset_is_valid_and_reads_back_from_its_commented_toml() {
    for preset in PRESETS {
        let config = Config::load(Some(preset.name), None, &[]).unwrap();
        let text = config.to_toml_commented();
        assert_eq!(Config::from_toml(Path::new("printed"), &text).unwrap(), config, "{text}");
        let resolved = config
            .resolve(&DataFacts { count: 100, size: Size { height: 32, width: 64 }, channels: 3 })
            .or_else(|_| {
                config.resolve(&DataFacts { count: 100, size: config.data.size.unwrap(), channels: 1 })
            })
            .unwrap();
        let text = resolved.to_toml_commented();
        assert_eq!(Config::from_toml(Path::new("printed"), &text).unwrap(), resolved, "{text}");
    }
}

#[test]
fn awkward_values_read_back_from_the_commented_toml() {
    let mut config = Config::default();
    config.data.path = "a \"b\" \\ 'c'\n\u{7f}é # x".into();
    config.data.size = Some(Size { height: 8, width: 12 });
    config.data.random_crop_scale = Some([1.0 / 3.0, 1.0]);
    config.data.csv = Some("a b, 'c'.csv".into());
    config.data.alpha = Some(crate::data::Alpha::White);
    config.data.resize_side = Some(16);
    config.data.horizontal_flip = true;
    config.optimizer.eps = 1e-37;
    config.optimizer.lr = 0.1 + 0.2;
    config.train.seed = i64::MAX as u64;
    config.diffusion.beta_end = 1.0 / 3.0;
    assert_eq!(Config::from_toml(Path::new("printed"), &config.to_toml_commented()).unwrap(), config);
}

#[test]
fn the_commented_toml_documents_every_key() {
    for &(network, own_section) in NetworkKind::SECTIONS {
        let mut config = Config::default();
        config.network.name = network;
        let text = config.to_toml_commented();
        assert_eq!(Config::from_toml(Path::new("printed"), &text).unwrap(), config);
        for section in SECTIONS {
            let heading = format!("\n[{}]\n", section.name);
            if section.name != own_section && NetworkKind::SECTIONS.iter().any(|(_, s)| *s == section.name) {
                assert!(!text.contains(&heading), "{network:?} does not use [{}]", section.name);
                continue;
            }
            let (_, body) = text.split_once(&heading).expect("the section");
            let lines: Vec<_> = body.lines().take_while(|l| !l.starts_with('[')).collect();
            for setting in section.settings {
                let key = format!("{} =", setting.name);
                let at = lines.iter().position(|l| l.trim_start_matches("# ").starts_with(&key)).unwrap();
                assert!(
                    lines[at - 1].starts_with(&format!("# {} (default ", setting.doc)),
                    "{}",
                    lines[at - 1]
                );
                assert!(!setting.doc.is_empty() && !setting.doc.contains('\n'));
            }
        }
    }
}

#[test]
fn invalid_network_settings_are_errors_with_the_key_and_a_remedy() {
    for (network, key, value, expected) in [
        ("simple", "widths", "[64]", "simple.widths: has 1 entries; give 2 to 16"),
        ("simple", "time_emb_dim", "2", "simple.time_emb_dim: 2 is out of range"),
        ("simple", "time_emb_dim", "33", "simple.time_emb_dim: is odd"),
        (
            "double-conv",
            "base_channels",
            "66",
            "double_conv.base_channels: 66 is not divisible by 4 (4 heads); use 64 or 68",
        ),
        ("double-conv", "dropout", "1", "double_conv.dropout: 1 is out of range"),
        (
            "unet2d",
            "block_out_channels",
            "[128, 100]",
            "unet2d.block_out_channels: 100 is not divisible by 32",
        ),
        ("unet2d", "block_out_channels", "[32, 64]", "unet2d.down_block_types: has 4 entries; give 2"),
        ("unet2d", "attention_head_dim", "96", "unet2d.block_out_channels: 128 is not divisible by 96"),
        ("unet2d", "norm_eps", "0", "unet2d.norm_eps: 0 is out of range"),
        ("unet2d", "act_fn", "tanh", "unet2d.act_fn: unknown variant `tanh`"),
        ("unet2d", "num_class_embeds", "0", "unet2d.num_class_embeds: 0 is out of range"),
        (
            "unet2d",
            "up_block_types",
            r#"["DownBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"]"#,
            "unet2d.up_block_types: DownBlock2D is not allowed here; use UpBlock2D or AttnUpBlock2D",
        ),
    ] {
        let key = format!("{}.{key}", network.replace('-', "_"));
        let settings = [("network.name", network), (&key, value)];
        let error = set(&settings).expect_err(expected).to_string();
        assert!(error.starts_with(expected), "{error}, not {expected}");
    }
    // Sections of other networks are ignored.
    assert!(set(&[("simple.time_emb_dim", "33")]).is_ok());
    let error = set(&[("network.name", "simple"), ("data.size", "40")]).unwrap_err().to_string();
    assert!(
        error.contains("cannot be halved 4 times, as simple.widths requires; use 32x32 or 48x48"),
        "{error}"
    );
}

#[test]
fn schedule_names_are_the_same_in_settings_and_elsewhere() {
    for kind in ScheduleKind::ALL {
        assert_eq!(set(&[("diffusion.schedule", kind.name())]).unwrap().diffusion.schedule, kind);
        assert_eq!(kind.to_string().parse::<ScheduleKind>().unwrap(), kind);
    }
    let message = "cosin".parse::<ScheduleKind>().unwrap_err().to_string();
    assert!(message.starts_with("diffusion.schedule: unknown schedule \"cosin\"; give one of linear, "));
    assert!(set_error("diffusion.schedule", "cosin").contains("`scaled-linear`"));
}

#[test]
fn the_tutorials_yaml_is_accepted_unchanged() {
    for name in ["default.yaml", "settings"] {
        let loaded = load_file(name, TUTORIAL).unwrap();
        let mut expected = Config::default();
        expected.data.path = "data/train/images".into();
        expected.network.im_channels = Some(1);
        expected.network.im_size = Some(Size { height: 28, width: 28 });
        expected.output.sample_count = 100;
        assert_eq!(loaded.config, expected);
        assert_eq!(loaded.config.train.epochs, Some(40));
        assert_eq!(loaded.config.attention.down_sample, [true, true, false]);
        assert_eq!(loaded.run_name.as_deref(), Some("default"));
        assert_eq!(loaded.notes.len(), 2);
        assert!(loaded.notes[1].starts_with("train_params.ckpt_name is ignored"), "{:?}", loaded.notes);
    }
}

#[test]
fn mistakes_in_the_tutorials_yaml_are_reported_with_their_line() {
    let wrong = |from: &str, to: &str| file_error("default.yaml", &TUTORIAL.replace(from, to));
    assert_eq!(
        wrong("batch_size: 64", "bach_size: 64"),
        "line 20: train_params.bach_size: unknown setting; did you mean batch_size?"
    );
    assert_eq!(
        wrong("model_params:", "modl_params:"),
        "line 7: modl_params: unknown section; did you mean model_params?"
    );
    assert!(
        wrong("num_heads : 4", "num_heads : four")
            .starts_with("line 17: attention.num_heads: invalid type: string")
    );
    assert!(wrong("num_heads : 4", "num_heads : 4\n  num_heads : 8").starts_with("line 18: "));
    assert!(wrong("lr: 0.0001", "lr:").starts_with("line 24: "));
    assert!(wrong("[256, 256, 128]", "[256, 256, 128").starts_with("line "));
    assert!(file_error("a.yaml", "- 1\n- 2\n").contains("YAML"));
}

#[test]
fn a_yaml_bomb_is_refused() {
    let mut text = String::from("dataset_params:\n  a: &a [x,x,x,x,x,x,x,x,x]\n");
    for (from, to) in "abcdefghijk".chars().zip("bcdefghijkl".chars()) {
        text += &format!("  {to}: &{to} [{}]\n", vec![format!("*{from}"); 9].join(","));
    }
    let message = file_error("a.yaml", &text);
    assert!(message.contains("budget"), "{message}");
}

#[test]
fn unknown_settings_suggest_the_nearest_known_one() {
    let toml = |text: &str| file_error("a.toml", text);
    assert_eq!(
        toml("[data]\npath = 'x'\n\n[train]\nlr = 1e-3\nbach_size = 3\n"),
        "line 6: train.bach_size: unknown setting; did you mean batch_size?"
    );
    assert_eq!(
        toml("train.bach_size = 3"),
        "line 1: train.bach_size: unknown setting; did you mean batch_size?"
    );
    assert_eq!(
        toml("[train]\ntimesteps = 3"),
        "line 2: train.timesteps: unknown setting; did you mean diffusion.timesteps?"
    );
    assert_eq!(
        toml("\nbatch_size = 3"),
        "line 2: batch_size: unknown setting; did you mean train.batch_size?"
    );
    assert_eq!(toml("[trian]\nlr = 1"), "line 2: trian.lr: unknown setting; did you mean optimizer.lr?");
    assert_eq!(toml("[trian]\n"), "line 1: trian: unknown section; did you mean train?");
    assert_eq!(toml("[[train]]\nlr = 1"), "line 1: train: is a section, not a setting");
    assert!(
        toml("[data]\nzzzzzz = 1")
            .contains("unknown setting; [data] has path, size, channels, on_bad_file, ")
    );

    assert_eq!(
        set_error("train.bach_size", "3"),
        "train.bach_size: unknown setting; did you mean batch_size?"
    );
    assert_eq!(set_error("heads", "3"), "heads: unknown setting; did you mean attention.num_heads?");
    assert_eq!(
        set_error("qqqqqqqq", "3"),
        "qqqqqqqq: unknown section; the sections are data, diffusion, sampling, network, attention, simple, double_conv, unet2d, train, loss, optimizer, lr_schedule, ema, compute, output"
    );
    let preset = Config::load(Some("minst"), None, &[]).unwrap_err().to_string();
    assert_eq!(preset, "preset: unknown preset \"minst\"; did you mean mnist?");
}

#[test]
fn wrong_types_and_broken_files_are_reported_with_their_line() {
    let toml = |text: &str| file_error("a.toml", text);
    assert_eq!(
        toml("[train]\nbatch_size = 'many'"),
        "line 2: train.batch_size: invalid type: string \"many\", expected a non-negative integer"
    );
    assert!(
        toml("[train]\nbatch_size = -1").starts_with("line 2: train.batch_size: invalid value: integer `-1`")
    );
    assert!(
        toml("[train]\noptimizer = 'sgd'")
            .contains("train.optimizer: unknown variant `sgd`, expected `adam` or `adamw`")
    );
    assert!(
        toml("[data]\nsize = [1, 2, 3]")
            .contains("data.size: expected one side in pixels, HEIGHTxWIDTH or [height, width]")
    );
    assert!(toml("[train\nlr = 1").starts_with("line 1: "));
    assert!(toml("[train]\nlr = 1\nlr = 2").starts_with("line 3: "));
    let (_folder, path) = file("a.toml", "");
    std::fs::write(&path, [0xff, 0xfe]).unwrap();
    assert!(Config::load(None, Some(&path), &[]).unwrap_err().to_string().contains("UTF-8"));
    std::fs::write(&path, vec![b'#'; MAX_FILE as usize + 1]).unwrap();
    assert!(Config::load(None, Some(&path), &[]).unwrap_err().to_string().contains("larger than"));
    assert!(matches!(Config::load(None, Some(Path::new("/nowhere/x.toml")), &[]), Err(Error::Io { .. })));
}

#[test]
fn later_sources_override_earlier_ones() {
    let (_folder, path) = file("a.toml", "[train]\nlr = 0.5\nbatch_size = 16\nepochs = 3\n");
    let overrides =
        [("optimizer.lr".to_owned(), "0.25".to_owned()), ("optimizer.lr".to_owned(), "0.125".to_owned())];
    let config = Config::load(Some("digits"), Some(&path), &overrides).unwrap();
    assert_eq!((config.optimizer.lr, config.train.batch_size), (0.125, 16));
    let preset = Config::load(Some("digits"), None, &[]).unwrap();
    assert_ne!(preset.attention, Config::default().attention);
    assert_eq!(config.attention, preset.attention);
    assert_eq!((config.train.steps, config.train.epochs), (None, Some(3)));
    assert_eq!(Config::load(None, None, &[]).unwrap(), Config::load(Some("digits"), None, &[]).unwrap());
    assert_eq!(Config::load(None, Some(&path), &[]).unwrap().attention, Config::default().attention);
}

#[test]
fn steps_and_epochs_replace_each_other_but_cannot_both_be_set() {
    let config = set(&[("train.steps", "1e3")]).unwrap();
    assert_eq!((config.train.steps, config.train.epochs), (Some(1000), None));
    let both = set(&[("train.steps", "10"), ("train.epochs", "2")]).unwrap_err().to_string();
    assert_eq!(both, "train.epochs: train.steps is set too; set only one of them");
    assert!(set_error("train.epochs", "none").contains("neither this nor train.epochs is set"));
}

#[test]
fn overrides_are_toml_or_plain_text() {
    let config = set(&[
        ("data.path", "some/folder, with comma"),
        ("data.size", "16,24"),
        ("attention.down_channels", "[32, 64]"),
        ("attention.mid_channels", "64,32"),
        ("attention.down_sample", "[true]"),
        ("optimizer.name", "adamw"),
    ])
    .unwrap();
    assert_eq!(config.data.path, "some/folder, with comma");
    assert_eq!(config.data.size, Some(Size { height: 16, width: 24 }));
    assert_eq!((config.attention.down_channels, config.attention.mid_channels), (vec![32, 64], vec![64, 32]));
    assert_eq!(config.optimizer.name, OptimizerKind::AdamW);
    assert_eq!(set(&[("data.path", "2024")]).unwrap().data.path, "2024");
    assert_eq!(set(&[("data.path", "none")]).unwrap().data.path, "none");
    assert_eq!(set(&[("data.size", "28"), ("data.size", "none")]).unwrap().data.size, None);
    let sizes =
        ["24x32", "24X32", "[24, 32]", "24, 32"].map(|text| set(&[("data.size", text)]).unwrap().data.size);
    assert_eq!(sizes, [Some(Size { height: 24, width: 32 }); 4]);
    assert!(set_error("train.batch_size", "1.5").contains("expected a non-negative integer"));
    assert!(set_error("train.batch_size", "3\ntrain.lr=1").contains("expected a non-negative integer"));
}

/// Settings, values and the start of the error.
const OUT_OF_RANGE: &[(&str, &str, &str)] = &[
    ("data.path", "", "data.path: is empty"),
    ("data.channels", "5", "data.channels: 5 is out of range; give 1 to 4"),
    ("data.size", "0", "data.size: 0 is out of range"),
    ("data.resize", "crop", "data.resize: "),
    ("data.resize_side", "27", "data.resize_side: it is the size before the crop"),
    ("data.random_crop_scale", "[0.5, 2]", "data.random_crop_scale: [0.5, 2] is out of range"),
    ("data.random_crop_scale", "0.5", "data.random_crop_scale: "),
    ("data.alpha", "red", "data.alpha: "),
    ("data.memory_mib", "17592186044416", "data.memory_mib: 17592186044416 is out of range"),
    ("data.csv_id_column", "id", "data.csv_id_column: is given without a CSV file"),
    ("data.csv_label_column", "sex", "data.csv_label_column: is given without a CSV file"),
    (
        "data.size",
        "30",
        "data.size: 30x30 cannot be halved 2 times, as attention.down_sample requires; use 28x28 or 32x32",
    ),
    ("diffusion.timesteps", "0", "diffusion.timesteps: 0 is out of range"),
    ("diffusion.beta_start", "0", "diffusion.beta_start: 0 is out of range"),
    ("diffusion.beta_start", "1e-17", "diffusion.beta_start: "),
    ("optimizer.eps", "1e-46", "optimizer.eps: "),
    ("loss.huber_delta", "1e-46", "loss.huber_delta: "),
    (
        "diffusion.beta_start",
        "0.5",
        "diffusion.beta_end: 0.02 is out of range; give a number between beta_start, 0.5",
    ),
    ("diffusion.beta_end", "1", "diffusion.beta_end: 1 is out of range"),
    ("diffusion.max_beta", "1", "diffusion.max_beta: 1 is out of range; give a number of at least 0.5"),
    ("attention.num_heads", "3", "attention.num_heads: 3 heads do not divide"),
    ("attention.num_heads", "0", "attention.num_heads: 0 heads do not divide"),
    ("attention.down_channels", "[32, 60, 128, 256]", "attention.down_channels: 60 is not divisible by 8"),
    ("attention.down_channels", "[32]", "attention.down_channels: has 1 entries"),
    ("attention.down_channels", "[32, 64, 128, 512]", "attention.mid_channels: starts with 256"),
    ("attention.mid_channels", "[256, 256]", "attention.mid_channels: ends with 256"),
    ("attention.down_sample", "[true, true]", "attention.down_sample: has 2 entries; give 3"),
    ("attention.time_emb_dim", "127", "attention.time_emb_dim: is odd"),
    ("train.batch_size", "0", "train.batch_size: 0 is out of range"),
    ("optimizer.lr", "0", "optimizer.lr: 0 is out of range"),
    ("optimizer.lr", "nan", "optimizer.lr: NaN is out of range"),
    ("optimizer.beta2", "1", "optimizer.beta2: 1 is out of range"),
    ("optimizer.eps", "0", "optimizer.eps: 0 is out of range"),
    ("optimizer.weight_decay", "-1", "optimizer.weight_decay: -1 is out of range"),
    ("optimizer.weight_decay", "inf", "optimizer.weight_decay: inf is out of range"),
    ("train.accumulate", "0", "train.accumulate: 0 is out of range"),
    ("loss.name", "l2", "loss.name: unknown variant `l2`, expected one of `mse`, `l1`, `huber`"),
    ("loss.huber_delta", "0", "loss.huber_delta: 0 is out of range"),
    ("lr_schedule.min_lr", "1", "lr_schedule.min_lr: 1 is out of range; give 0 to 0.0001"),
    ("lr_schedule.plateau_factor", "1", "lr_schedule.plateau_factor: 1 is out of range"),
    ("lr_schedule.plateau_threshold", "-1", "lr_schedule.plateau_threshold: -1 is out of range"),
    ("optimizer.clip_norm", "-1", "optimizer.clip_norm: -1 is out of range"),
    ("optimizer.clip_norm", "nan", "optimizer.clip_norm: NaN is out of range"),
    ("ema.decay", "1", "ema.decay: 1 is out of range"),
    (
        "ema.schedule",
        "slow",
        "ema.schedule: unknown variant `slow`, expected one of `warm-up`, `fixed`, `half-life`",
    ),
    ("ema.half_life", "0", "ema.half_life: 0 is out of range"),
    (
        "diffusion.prediction",
        "x",
        "diffusion.prediction: unknown variant `x`, expected one of `eps`, `x0`, `v`",
    ),
    ("loss.weighting", "snr", "loss.weighting: unknown variant `snr`, expected one of `plain`, `min-snr`"),
    ("loss.min_snr_gamma", "0", "loss.min_snr_gamma: 0 is out of range"),
    ("loss.p2_k", "nan", "loss.p2_k: NaN is out of range"),
    ("loss.p2_gamma", "-1", "loss.p2_gamma: -1 is out of range"),
    ("loss.offset_noise", "-0.1", "loss.offset_noise: -0.1 is out of range"),
    ("loss.input_perturbation", "nan", "loss.input_perturbation: NaN is out of range"),
    ("train.label_dropout", "1.5", "train.label_dropout: 1.5 is out of range"),
    ("attention.num_class_embeds", "0", "attention.num_class_embeds: 0 is out of range"),
    ("train.steps", "4294967296", "train.steps: 4294967296 is out of range"),
    ("output.keep_checkpoints", "1", "output.keep_checkpoints: 1 is out of range"),
];

#[test]
fn values_out_of_range_are_errors_with_the_key_and_a_remedy() {
    for &(key, value, expected) in OUT_OF_RANGE {
        let message = set_error(key, value);
        assert!(message.starts_with(expected), "{key} = {value}: {message}");
    }
}

#[test]
fn settings_that_exclude_each_other_are_errors() {
    let one = set(&[("diffusion.timesteps", "1"), ("diffusion.zero_terminal_snr", "true")]);
    assert!(
        one.unwrap_err().to_string().starts_with("diffusion.zero_terminal_snr: needs at least 2 timesteps")
    );
    let infinite = [("diffusion.zero_terminal_snr", "true"), ("loss.weighting", "snr-truncated")];
    assert!(
        set(&infinite)
            .unwrap_err()
            .to_string()
            .starts_with("loss.weighting: \"snr-truncated\" with prediction = eps is infinite")
    );
    assert!(set(&[infinite[0], infinite[1], ("diffusion.prediction", "v")]).is_ok());
    // Without zero_terminal_snr too: after so many steps no signal is left either.
    let long = [("diffusion.timesteps", "20000"), ("loss.weighting", "snr-truncated")];
    let message = set(&long).unwrap_err().to_string();
    assert!(
        message.starts_with("loss.weighting: \"snr-truncated\" with prediction = eps is infinite"),
        "{message}"
    );
    assert!(set(&[long[0], long[1], ("diffusion.prediction", "x0")]).is_ok());
    let steep = [("loss.weighting", "p2"), ("loss.p2_k", "0.01"), ("loss.p2_gamma", "100")];
    assert!(set(&steep).unwrap_err().to_string().starts_with("loss.weighting: is infinite at t = "));
    let many = set(&[("train.steps", "1e9"), ("train.accumulate", "5")]).unwrap_err().to_string();
    assert!(
        many.starts_with("train.accumulate: 5 is out of range: a run has at most 4294967295 micro-batches")
    );
    let mut config = Config::default();
    config.train.seed = u64::MAX;
    assert!(config.validate().unwrap_err().to_string().starts_with("train.seed: "));
}

#[test]
fn resolving_fills_in_the_properties_of_the_data() {
    let facts = DataFacts { count: 130, size: Size { height: 28, width: 28 }, channels: 1 };
    let config = set(&[("train.epochs", "3")]).unwrap().resolve(&facts).unwrap();
    // ceil(3 * 130 / 64)
    assert_eq!((config.train.steps, config.train.epochs), (Some(7), None));
    let accumulated = set(&[("train.epochs", "3"), ("train.accumulate", "2")]).unwrap();
    // ceil(3 * 130 / 128)
    assert_eq!(accumulated.resolve(&facts).unwrap().train.steps, Some(4));
    assert_eq!((config.network.im_size, config.network.im_channels), (Some(facts.size), Some(1)));
    assert_eq!(config.resolve(&facts).unwrap(), config);

    let other = config.resolve(&DataFacts { channels: 3, ..facts }).unwrap_err().to_string();
    assert_eq!(
        other,
        "network.im_channels: is 1 but data.channels is 3; make them equal or leave this one unset"
    );
    let odd = Config::default().resolve(&DataFacts { size: Size { height: 28, width: 30 }, ..facts });
    assert!(odd.unwrap_err().to_string().contains("use 28x28 or 28x32"));
    assert!(Config::default().resolve(&DataFacts { count: usize::MAX, ..facts }).is_err());
    assert!(Config::default().resolve(&DataFacts { count: 0, ..facts }).is_err());
}

#[test]
fn lists_of_words_can_be_separated_by_commas_like_lists_of_integers() {
    let types = |value: &str| {
        let pairs =
            [("unet2d.block_out_channels", "32,64"), ("unet2d.up_block_types", "UpBlock2D, AttnUpBlock2D")];
        let all = [&pairs[..], &[("unet2d.down_block_types", value), ("network.name", "unet2d")]].concat();
        set(&all).map(|config| config.unet2d.down_block_types).map_err(|e| e.to_string())
    };
    let expected = Ok(vec![BlockType::DownBlock2D, BlockType::AttnDownBlock2D]);
    for value in [
        "DownBlock2D,AttnDownBlock2D",
        " DownBlock2D , AttnDownBlock2D ",
        "[DownBlock2D, AttnDownBlock2D]",
        "[\"DownBlock2D\", \"AttnDownBlock2D\"]",
        "\"DownBlock2D\", 'AttnDownBlock2D'",
    ] {
        assert_eq!(types(value), expected, "{value}");
    }
    // The error names the unknown word; it does not say that the text is not a list.
    let error = types("DownBlock2D,Down").unwrap_err();
    assert!(error.contains("unet2d.down_block_types") && error.contains("Down`"), "{error}");
    assert!(error.contains("AttnDownBlock2D"), "{error}");
    // A string setting keeps its commas.
    assert_eq!(set(&[("data.path", "my photos, 2024")]).unwrap().data.path, "my photos, 2024");
}
