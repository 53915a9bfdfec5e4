//! Training steps and learning rates compared with PyTorch (`tools/golden/training.py`, `tools/golden/rates.py`).

use ddpm::checkpoint::read_weights_file;
use ddpm::config::Config;
use ddpm::config::open_data;
use ddpm::lr_schedule::{LearningRate, Plateau};
use ddpm::train::Trainer;
use ddpm_rng::{Purpose, Stream};
use serde_json::Value;
use std::path::Path;

/// Relative error of a step's loss: f32 here, f64 in PyTorch.
const LOSS_TOLERANCE: f64 = 1e-4;
/// Relative error of a step's gradient norm.
const NORM_TOLERANCE: f64 = 1e-3;
/// Relative error of a learning rate: both are f64, but PyTorch computes each rate from the previous one.
const RATE_TOLERANCE: f64 = 1e-11;

fn json(text: &str) -> Value {
    serde_json::from_str(text).expect("JSON")
}

fn floats(v: &Value) -> Vec<f64> {
    v.as_array().expect("a list").iter().map(|x| x.as_f64().expect("a number")).collect()
}

/// Writes the images of the golden script as an IDX file.
fn write_images(path: &Path, images: u32, height: u32, width: u32) {
    let mut bytes = vec![0, 0, 8, 3];
    for size in [images, height, width] {
        bytes.extend(size.to_be_bytes());
    }
    for i in 0..images {
        let words = Stream::new(2026, Purpose::Test, 0, i).words();
        bytes.extend(words.take((height * width) as usize).map(|word| word as u8));
    }
    std::fs::write(path, bytes).expect("the images");
}

/// Every setting of a section of the golden file, in the form of `--set`.
fn overrides(section: &str, settings: &Value) -> Vec<(String, String)> {
    let all = settings.as_object().expect("settings").iter();
    all.map(|(key, v)| (format!("{section}.{key}"), v.as_str().map_or(v.to_string(), str::to_owned)))
        .collect()
}

#[test]
fn losses_of_twenty_steps_with_every_setting_match_pytorch() {
    let golden = json(include_str!("golden/training.json"));
    let weights = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/training.safetensors");
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("images-idx3-ubyte");
    let size: Vec<u32> = floats(&golden["size"]).iter().map(|&s| s as u32).collect();
    write_images(&data, golden["images"].as_u64().expect("a number") as u32, size[0], size[1]);
    for run in golden["runs"].as_array().expect("runs") {
        let net = &golden["network"];
        let mut settings = overrides("train", &run["settings"]);
        settings.extend(
            [
                ("data.path", data.display().to_string()),
                ("attention.down_channels", net["down"].to_string()),
                ("attention.mid_channels", net["mid"].to_string()),
                ("attention.down_sample", net["resample"].to_string()),
                ("attention.time_emb_dim", net["temb"].to_string()),
                ("attention.num_down_layers", net["layers"][0].to_string()),
                ("attention.num_mid_layers", net["layers"][1].to_string()),
                ("attention.num_up_layers", net["layers"][2].to_string()),
                ("attention.num_heads", net["heads"].to_string()),
            ]
            .map(|(key, value)| (key.to_owned(), value)),
        );
        let config = Config::load(Some("mnist"), None, &settings).expect("settings");
        let mut trainer = Trainer::new(&config, open_data(&config).expect("data")).expect("a trainer");
        trainer.set_weights(&read_weights_file(&weights).expect("weights"), &weights).expect("they fit");
        let wants = ["loss", "grad_norm", "learning_rate"].map(|key| floats(&run[key]));
        let mut worst = [0f64; 3];
        for step in 0..wants[0].len() {
            let got = trainer.step().expect("a step");
            let gots = [f64::from(got.loss), got.grad_norm, got.learning_rate];
            for (i, tolerance) in [LOSS_TOLERANCE, NORM_TOLERANCE, RATE_TOLERANCE].into_iter().enumerate() {
                let error = (gots[i] / wants[i][step] - 1.0).abs();
                assert!(
                    error <= tolerance,
                    "step {step}: {got:?}, PyTorch {:?}",
                    wants.each_ref().map(|w| w[step])
                );
                worst[i] = worst[i].max(error);
            }
        }
        let [loss, norm, rate] = worst;
        println!("largest errors: loss {loss:.1e}, norm {norm:.1e}, rate {rate:.1e}");
    }
}

#[test]
fn learning_rates_match_pytorch_at_every_step() {
    let golden = json(include_str!("golden/rates.json"));
    let cases = golden.as_array().expect("cases");
    assert_eq!(cases.len(), 10);
    for case in cases {
        let mut settings = case.clone();
        let (rates, losses) = (floats(&case["rates"]), case.get("losses").map(floats));
        let map = settings.as_object_mut().expect("settings");
        map.retain(|key, _| key != "rates" && key != "losses");
        map.entry("steps").or_insert(rates.len().into());
        let config = Config::load(Some("mnist"), None, &overrides("train", &settings)).expect("settings");
        let mut rate = LearningRate::new(&config);
        for (step, want) in rates.into_iter().enumerate() {
            let got = rate.at(step as u64);
            assert!(
                (got / want - 1.0).abs() <= RATE_TOLERANCE,
                "{settings}, step {step}: {got}, PyTorch {want}"
            );
            // Four steps per epoch.
            rate.observe(losses.as_ref().map_or(0.0, |l| l[step]), step % 4 == 3);
        }
    }
}

#[test]
fn plateau_state_is_restored_and_accepts_a_new_rate() {
    let config = |lr: f64| {
        let pairs = [
            ("optimizer.lr", lr.to_string()),
            ("lr_schedule.name", "plateau".to_owned()),
            ("lr_schedule.plateau_patience", "0".to_owned()),
            ("lr_schedule.plateau_factor", "0.5".to_owned()),
            ("lr_schedule.warmup_steps", "4".to_owned()),
        ];
        Config::load(Some("mnist"), None, &pairs.map(|(k, v)| (k.to_owned(), v))).expect("settings")
    };
    let mut rate = LearningRate::new(&config(0.1));
    assert_eq!((rate.at(0), rate.at(3), rate.at(4)), (0.025, 0.1, 0.1));
    rate.observe(1.0, true);
    rate.observe(1.0, true);
    // The warm-up rises to the reduced rate.
    assert_eq!((rate.at(1), rate.at(9)), (0.025, 0.05));
    rate.observe(0.25, false);

    let text = serde_json::to_string(&rate.plateau()).expect("JSON");
    let mut restored = LearningRate::new(&config(0.1));
    restored.restore(serde_json::from_str(&text).expect("the same")).expect("a valid state");
    assert_eq!(restored.plateau(), rate.plateau());
    assert_eq!(restored.at(9), 0.05);
    // A changed `optimizer.lr` takes effect; the lowest loss is kept.
    let mut changed = LearningRate::new(&config(0.3));
    changed.restore(rate.plateau()).expect("a valid state");
    assert_eq!((changed.at(9), changed.plateau().expect("a state").best), (0.3, Some(1.0)));
    // Without a saved state, the schedule starts from the beginning.
    changed.restore(None).expect("no state");
    assert_eq!((changed.at(9), changed.plateau().expect("a state").best), (0.3, None));
    // A manipulated checkpoint.
    let saved = rate.plateau().expect("a state");
    for broken in [
        Plateau { lr: -1.0, ..saved },
        Plateau { lr: 1e308, ..saved },
        Plateau { lr: f64::NAN, ..saved },
        Plateau { loss_sum: f64::INFINITY, ..saved },
        Plateau { best: Some(f64::NAN), ..saved },
    ] {
        let mut rate = LearningRate::new(&config(0.1));
        let error = rate.restore(Some(broken)).expect_err("an invalid state");
        assert!(error.contains("learning rate"), "{error}");
    }
    let mut rate = LearningRate::new(&config(0.1));
    rate.restore(Some(Plateau { steps: u64::MAX, bad_epochs: u64::MAX, ..saved })).expect("large counts");
    rate.observe(1.0, true);
}
