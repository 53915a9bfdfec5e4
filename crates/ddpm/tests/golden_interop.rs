//! Checkpoints written by PyTorch and diffusers (`tools/golden/interop.py`): network outputs, and export and import
//! round trips.

use ddpm::checkpoint::{self, NamedTensor, WeightsChoice, read_weights_file};
use ddpm::config::{Config, Size};
use ddpm::denoiser::{ConditionalDenoiser, Denoiser};
use ddpm::guidance::Guidance;
use ddpm::interop::{Format, ImportOptions, Imported, Role, WeightSet, export, read};
use ddpm::nets::NetworkKind;
use ddpm::pipeline::{Pipeline, SampleRequest};
use ddpm::sampler::{Threshold, Variance};
use ddpm::schedule::ScheduleKind;
use std::path::{Path, PathBuf};

/// Maximum error of the output, relative to its largest absolute value.
const TOLERANCE: f32 = 1e-4;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/interop").join(name)
}

fn options(more: &[(&str, &str)]) -> ImportOptions {
    let overrides = more.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
    ImportOptions { size: Some(Size { height: 8, width: 8 }), overrides, ..ImportOptions::default() }
}

fn import(name: &str, options: &ImportOptions) -> Imported {
    read(&golden(name), options).unwrap_or_else(|e| panic!("{e}"))
}

/// Converts 8x8 images from channels first to channels last, or `back`.
fn permute_channels(x: &[f32], channels: usize, back: bool) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    for i in 0..x.len() {
        let (image, inside) = (i / (64 * channels), i % (64 * channels));
        let last = image * 64 * channels + inside % 64 * channels + inside / 64;
        let (from, to) = if back { (last, i) } else { (i, last) };
        out[to] = x[from];
    }
    out
}

/// Compares the network's output with PyTorch's for a golden case.
fn check_output(case: &str, config: &Config, weights: Vec<NamedTensor>) {
    let expected = read_weights_file(&golden("expected.safetensors")).unwrap();
    let find = |part: &str| expected.iter().find(|t| t.name == format!("{case}/{part}"));
    let (x, t, y) = (find("x").unwrap(), find("t").unwrap(), find("y").unwrap());
    let channels = x.shape[1];
    let pipeline = Pipeline::new(config, weights, Path::new(case), 0).unwrap();
    let mut model = pipeline.model(1).unwrap();
    let (mut worst, largest) = (0f32, y.data.iter().fold(0f32, |m, v| m.max(v.abs())));
    for i in 0..x.shape[0] {
        if let Some(label) = find("label") {
            model.set_labels(&[Some(label.data[i] as u32)]).unwrap();
        }
        let n = 64 * channels;
        let mut out = vec![0.0; n];
        model
            .predict(
                &permute_channels(&x.data[i * n..][..n], channels, false),
                f64::from(t.data[i]),
                &mut out,
            )
            .unwrap();
        let out = permute_channels(&out, channels, true);
        worst = out.iter().zip(&y.data[i * n..]).map(|(a, b)| (a - b).abs()).fold(worst, f32::max);
    }
    println!("{case}: off by {:.1e}", worst / largest);
    assert!(worst <= TOLERANCE * largest, "{case}: off by {:.1e} of the largest value", worst / largest);
}

#[test]
fn pytorch_files_are_detected_and_outputs_match() {
    let heads = ImportOptions { heads: Some(2), ..options(&[]) };
    for (file, case) in [
        ("attention.pth", "attention"),
        ("attention-legacy.pth", "attention"),
        ("attention-half.ckpt", "attention-half"),
    ] {
        let read = import(file, &heads);
        let net = &read.config.attention;
        assert_eq!(read.config.network.name, NetworkKind::Attention, "{file}");
        assert_eq!(
            (&net.down_channels[..], &net.mid_channels[..]),
            (&[8, 16][..], &[16, 16, 8][..]),
            "{file}"
        );
        assert_eq!((&net.down_sample[..], net.time_emb_dim, net.num_heads), (&[true][..], 8, 2), "{file}");
        assert_eq!((net.num_down_layers, net.num_mid_layers, net.num_up_layers), (1, 1, 1), "{file}");
        let assumed: Vec<_> = read.assumed.iter().map(|a| a.key).collect();
        let unknown = [
            "diffusion.timesteps",
            "diffusion.schedule",
            "diffusion.beta_start",
            "diffusion.beta_end",
            "diffusion.prediction",
        ];
        assert_eq!(assumed, unknown, "{file}");
        let half = case == "attention-half";
        assert_eq!(
            (read.key.as_str(), read.notes.len()),
            (if half { "state_dict.module" } else { "" }, usize::from(half))
        );
        check_output(case, &read.config, read.weights);
    }
    // Missing settings are assumed and reported.
    let read = import("attention.pth", &ImportOptions::default());
    let heads = read.assumed.iter().find(|a| a.key == "attention.num_heads").expect("heads are assumed");
    assert_eq!((heads.value.as_str(), read.config.attention.num_heads), ("4", 4));
    assert!(read.assumed.iter().any(|a| a.key == "network.im_size" && a.value == "28"));
}

#[test]
fn averaged_weights_are_preferred_unless_another_set_is_selected() {
    let read = import("simple.ckpt", &options(&[("diffusion.timesteps", "1000")]));
    assert_eq!((read.key.as_str(), read.role), ("ema", Role::Averaged));
    assert_eq!(read.others, [WeightSet { key: "model".into(), role: Role::Raw }]);
    assert_eq!((&read.config.simple.widths[..], read.config.simple.time_emb_dim), (&[4, 8, 12][..], 8));
    assert_eq!(read.config.diffusion.timesteps, 1000);
    check_output("simple-ema", &read.config, read.weights);
    let read = import("simple.ckpt", &ImportOptions { key: Some("model".into()), ..options(&[]) });
    assert_eq!((read.key.as_str(), read.config.diffusion.timesteps), ("model", 300));
    check_output("simple", &read.config, read.weights);
    let wrong = ImportOptions { key: Some("modl".into()), ..options(&[]) };
    let error = ddpm::interop::read(&golden("simple.ckpt"), &wrong).unwrap_err().to_string();
    assert!(
        error.contains("no weights named \"modl\"; --key can be one of \"model\" (raw), \"ema\" (averaged)"),
        "{error}"
    );
}

#[test]
fn diffusers_folders_match_and_round_trip_bit_exactly() {
    let folder = tempfile::tempdir().unwrap();
    for case in ["classic", "example", "classes", "options"] {
        let read = import(case, &ImportOptions::default());
        let assumed: Vec<_> = read.assumed.iter().map(|a| (a.key, a.value.as_str())).collect();
        let dropout = [("train.label_dropout", "0")];
        assert_eq!(assumed, dropout[..usize::from(case == "classes")], "{case}");
        assert!(read.notes.is_empty(), "{case}: {:?}", read.notes);
        assert_eq!(read.config.image_size(), Some(Size { height: 8, width: 8 }));
        check_output(case, &read.config, read.weights.clone());
        let (config, weights) = (read.config.clone(), read.weights.clone());
        let run = read.save(folder.path(), Some(case)).unwrap();
        assert_eq!(run.read_config().unwrap(), config, "{case}");
        let newest = checkpoint::newest(&run.checkpoints()).unwrap().unwrap().path;
        for (format, out) in [
            (Format::Diffusers, format!("{case}-pipe")),
            (Format::Pytorch, format!("{case}.pth")),
            (Format::Safetensors, format!("{case}.safetensors")),
        ] {
            let out = folder.path().join(out);
            let notes = export(&newest, WeightsChoice::Auto, format, &out).unwrap();
            assert_eq!(
                notes.len(),
                usize::from(case == "classes" && format == Format::Diffusers),
                "{notes:?}"
            );
            let back = ddpm::interop::read(&out, &ImportOptions::default()).unwrap();
            let sorted = |mut w: Vec<NamedTensor>| {
                w.sort_by(|a, b| a.name.cmp(&b.name));
                w
            };
            assert!(sorted(back.weights) == sorted(weights.clone()), "{case}, {format:?}");
            assert_eq!((back.config, back.assumed), (config.clone(), Vec::new()), "{case}");
            // The second export finds an existing file.
            let error = export(&newest, WeightsChoice::Auto, format, &out).unwrap_err().to_string();
            assert!(error.contains("already exists; choose another --out"), "{error}");
        }
    }
    // Case-specific settings.
    let of = |case| import(case, &ImportOptions::default()).config;
    let (classic, classes, options) = (of("classic"), of("classes"), of("options"));
    assert_eq!(classic.sampling.variance, Some(Variance::Large));
    assert_eq!((classic.unet2d.attention_head_dim, classic.unet2d.freq_shift), (None, 1.0));
    assert_eq!((classes.diffusion.schedule, classes.diffusion.max_beta), (ScheduleKind::Cosine, 0.999));
    assert_eq!((options.diffusion.timesteps, options.diffusion.schedule), (500, ScheduleKind::SigmoidBeta));
    assert_eq!(options.sampling.threshold, Threshold::None);
    // As diffusers pipelines sample; our default is the opposite.
    assert!([&classic, &classes, &options].iter().all(|c| !c.sampling.use_clipped_model_output));
    assert!(Config::default().sampling.use_clipped_model_output);
    // The network's folder alone, and its weight file alone, which has its settings next to it.
    for part in ["classic/unet", "classic/unet/diffusion_pytorch_model.bin"] {
        let read = import(part, &ImportOptions::default());
        assert_eq!((&read.config.unet2d, read.assumed.len()), (&classic.unet2d, 5), "{part}");
        assert!(!read.config.sampling.use_clipped_model_output, "{part}");
        check_output("classic", &read.config, read.weights);
    }
}

#[test]
fn an_imported_network_with_classes_is_guided_only_with_label_dropout_set() {
    let request = SampleRequest {
        guidance: Guidance { scale: 3.0, ..Guidance::default() },
        ..SampleRequest::default()
    };
    let check = |options: &ImportOptions| {
        let read = import("classes", options);
        Pipeline::new(&read.config, read.weights, Path::new("classes"), 0).unwrap().check(request)
    };
    let error = check(&ImportOptions::default()).unwrap_err().to_string();
    assert!(error.starts_with("guidance: ") && error.contains("or imported"), "{error}");
    check(&options(&[("train.label_dropout", "0.1")])).unwrap();
    assert_eq!(import("classes", &options(&[("train.label_dropout", "0.1")])).assumed, []);
}

#[test]
fn unet_weights_without_settings_are_detected_and_the_rest_is_assumed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("unet.bin");
    std::fs::copy(golden("classic/unet/diffusion_pytorch_model.bin"), &file).unwrap();
    let overrides = [
        ("unet2d.attention_head_dim", "none"),
        ("unet2d.norm_num_groups", "4"),
        ("unet2d.norm_eps", "1e-6"),
        ("unet2d.downsample_padding", "0"),
        ("unet2d.flip_sin_to_cos", "false"),
        ("unet2d.freq_shift", "1"),
    ];
    let read = read(&file, &options(&overrides)).unwrap();
    assert_eq!(read.config.unet2d, import("classic", &ImportOptions::default()).config.unet2d);
    let assumed: Vec<_> = read.assumed.iter().map(|a| a.key).collect();
    assert!(assumed.contains(&"unet2d.act_fn") && !assumed.contains(&"unet2d.norm_eps"), "{assumed:?}");
    check_output("classic", &read.config, read.weights);
}

#[test]
fn eps_prediction_with_zero_terminal_snr_is_exported_only_with_clipping() {
    let folder = tempfile::tempdir().unwrap();
    let export = |name: &str, more: &[(&str, &str)]| {
        let set = [&[("diffusion.zero_terminal_snr", "true")][..], more].concat();
        let run = import("classic", &options(&set)).save(folder.path(), Some(name)).unwrap();
        let newest = checkpoint::newest(&run.checkpoints()).unwrap().unwrap().path;
        export(&newest, WeightsChoice::Auto, Format::Diffusers, &folder.path().join(name).join("out"))
    };
    let notes = export("clip", &[]).unwrap();
    assert!(notes.len() == 1 && notes[0].contains("divides by zero"), "{notes:?}");
    for threshold in ["none", "dynamic"] {
        let error = export(threshold, &[("sampling.threshold", threshold)]).unwrap_err().to_string();
        assert!(error.contains("divides by zero") && error.contains("sampling.threshold"), "{error}");
        let v = [("sampling.threshold", threshold), ("diffusion.prediction", "v")];
        assert_eq!(export(&format!("{threshold}-v"), &v).unwrap(), Vec::<String>::new());
    }
}

#[test]
fn an_unrelated_config_json_next_to_a_file_is_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name);
    std::fs::copy(golden("attention.pth"), place("a.pth")).unwrap();
    std::fs::copy(golden("classic/unet/diffusion_pytorch_model.bin"), place("unet.bin")).unwrap();
    for foreign in [r#"{"model_type": "bert", "hidden_size": 768}"#, "no json"] {
        std::fs::write(place("config.json"), foreign).unwrap();
        let read = read(&place("a.pth"), &ImportOptions::default()).unwrap();
        assert_eq!((read.config.network.name, &read.notes[..]), (NetworkKind::Attention, &[][..]));
    }
    let alone = options(&[("unet2d.norm_num_groups", "4")]);
    for foreign in [r#"{"_class_name": "UNet2DConditionModel"}"#, r#"{"lr": 1e-4}"#] {
        std::fs::write(place("config.json"), foreign).unwrap();
        let read = read(&place("unet.bin"), &alone).unwrap();
        assert!(read.notes[0].contains("config.json does not describe a UNet2DModel"), "{:?}", read.notes);
        assert!(read.assumed.iter().any(|a| a.key == "unet2d.norm_eps"));
    }
}

/// Names of cases, networks, and their settings.
const ROUND_TRIPS: &[(&str, &str, &[&str])] = &[
    (
        "attention",
        "attention",
        &["attention.down_channels=8,16", "attention.mid_channels=16,8", "attention.down_sample=true"],
    ),
    (
        "attention-classes",
        "attention",
        &[
            "attention.down_channels=8,16",
            "attention.mid_channels=16,8",
            "attention.down_sample=true",
            "attention.num_class_embeds=10",
        ],
    ),
    ("simple", "simple", &["simple.widths=4,8"]),
    ("simple-classes", "simple", &["simple.widths=4,8", "simple.num_class_embeds=10"]),
    (
        "double-conv",
        "double-conv",
        &["double_conv.base_channels=8", "double_conv.time_emb_dim=16", "double_conv.num_heads=2"],
    ),
    ("unet2d", "unet2d", &["unet2d.block_out_channels=32,32,32,32"]),
    (
        "attention-variance",
        "attention",
        &[
            "attention.down_channels=8,16",
            "attention.mid_channels=16,8",
            "attention.down_sample=true",
            "diffusion.learned_variance=true",
        ],
    ),
    ("simple-variance", "simple", &["simple.widths=4,8", "diffusion.learned_variance=true"]),
    (
        "double-conv-variance",
        "double-conv",
        &[
            "double_conv.base_channels=8",
            "double_conv.time_emb_dim=16",
            "double_conv.num_heads=2",
            "diffusion.learned_variance=true",
        ],
    ),
    (
        "unet2d-variance",
        "unet2d",
        &["unet2d.block_out_channels=32,32,32,32", "diffusion.learned_variance=true"],
    ),
];

#[test]
fn all_networks_round_trip_through_pytorch_bit_exactly() {
    use ddpm::data::digits::Digits;
    use ddpm::train::Trainer;
    let folder = tempfile::tempdir().unwrap();
    for &(case, name, settings) in ROUND_TRIPS {
        let learned = case.ends_with("variance");
        let mut pairs = vec![("network.name".to_owned(), name.to_owned())];
        pairs.extend(
            settings.iter().map(|s| s.split_once('=').unwrap()).map(|(k, v)| (k.to_owned(), v.to_owned())),
        );
        pairs.extend(
            [("train.batch_size", "2"), ("optimizer.lr", "1e-3")].map(|(k, v)| (k.to_owned(), v.to_owned())),
        );
        let config = Config::load(Some("digits"), None, &pairs).unwrap();
        let mut trainer = Trainer::new(&config, Box::new(Digits::new(0, 16, 10).unwrap())).unwrap();
        trainer.step().unwrap();
        let checkpoint = trainer.checkpoint(None).unwrap();
        let path = checkpoint::save(&folder.path().join(case), &checkpoint).unwrap();
        for (which, weights) in
            [(WeightsChoice::Raw, &checkpoint.weights), (WeightsChoice::Ema, &checkpoint.ema)]
        {
            let out = folder.path().join(format!("{case}-{which:?}.pth"));
            let notes = export(&path, which, Format::Pytorch, &out).unwrap();
            let classes = case.ends_with("classes");
            assert_eq!(
                notes.iter().filter(|n| n.contains("class_embedding.weight")).count(),
                usize::from(classes)
            );
            assert_eq!(
                notes.iter().filter(|n| n.contains("learns the variance")).count(),
                usize::from(learned)
            );
            let back = read(&out, &options(&[])).unwrap();
            assert_eq!(back.config.diffusion.learned_variance, learned, "{case}");
            assert_eq!(back.config.network.name, config.network.name);
            assert_eq!(back.config.attention.num_class_embeds, config.attention.num_class_embeds, "{case}");
            assert_eq!(back.config.simple.num_class_embeds, config.simple.num_class_embeds, "{case}");
            assert_eq!(back.assumed, [], "{case}");
            for tensor in weights {
                let same = back.weights.iter().find(|t| t.name == tensor.name).expect("the tensor");
                assert!(same == tensor, "{case}: {}", tensor.name);
            }
            assert_eq!(back.weights.len(), weights.len());
        }
        if learned && name == "unet2d" {
            let out = folder.path().join("learned-pipe");
            let notes = export(&path, WeightsChoice::Raw, Format::Diffusers, &out).unwrap();
            assert!(notes.len() == 1 && notes[0].contains("use_clipped_model_output"), "{notes:?}");
            let back = read(&out, &ImportOptions::default()).unwrap();
            assert_eq!(back.config.sampling.variance, Some(Variance::Learned));
            assert_eq!(
                (back.config.unet2d, back.config.diffusion),
                (config.unet2d.clone(), config.diffusion.clone())
            );
        }
        if name != "unet2d" {
            let error = export(&path, WeightsChoice::Raw, Format::Diffusers, &folder.path().join("no"))
                .unwrap_err()
                .to_string();
            assert!(
                error.contains("only unet2d can be exported to it. Export to pytorch or safetensors"),
                "{error}"
            );
        }
    }
}

#[test]
fn training_resumes_from_an_imported_run() {
    let folder = tempfile::tempdir().unwrap();
    let size = Some(Size { height: 12, width: 12 });
    let run = import("attention.pth", &ImportOptions { heads: Some(2), size, ..options(&[]) });
    let weights = run.weights.clone();
    let run = run.save(folder.path(), Some("r")).unwrap();
    let resume = |change: &dyn Fn(&mut Config) -> ddpm::Result<()>| {
        let resume = ddpm::train::Resume { checkpoint: None, change, force: false };
        ddpm::train::Run::resume(folder.path(), run.path(), &resume)
    };
    let error = resume(&|_| Ok(())).err().expect("no data").to_string();
    assert!(
        error.contains("data.path: is unknown, because the run was imported") && error.contains("--data"),
        "{error}"
    );
    let digits = |config: &mut Config| {
        config.data.path = "digits".into();
        config.data.digits_count = 16;
        (config.train.batch_size, config.train.steps, config.train.epochs) = (2, Some(1), None);
        config.output.sample_count = 0;
        Ok(())
    };
    let mut session = resume(&digits).unwrap();
    let begin = session.trainer().tensors(ddpm_engine::Region::Weights).unwrap();
    for tensor in &weights {
        assert!(begin.iter().any(|t| t == tensor), "{}", tensor.name);
    }
    session.train().unwrap();
    let path = checkpoint::path_of(&run.checkpoints(), 1);
    assert!(checkpoint::load(&path).unwrap().exp_avg.iter().any(|t| t.data.iter().any(|&v| v != 0.0)));
}
