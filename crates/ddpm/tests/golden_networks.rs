//! The networks compared with PyTorch (`tools/golden/attention.py`, `tools/golden/networks.py`): output,
//! loss, all gradients, and the losses of 20 Adam steps.

use ddpm::checkpoint::NamedTensor;
use ddpm::config::Config;
use ddpm::denoiser::Denoiser;
use ddpm::model::{Model, NoiseSource, TrainingGraph};
use ddpm::nets::NetworkKind;
use ddpm::nets::{Network, ParameterSpec};
use ddpm::schedule::Schedule;
use ddpm_engine::{AdamStep, Executor, Region, RngKey};
use ddpm_engine_cpu::CpuExecutor;
use ddpm_rng::{Purpose, Stream, below};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::path::Path;

/// Largest error of the output, relative to its largest magnitude.
const OUTPUT_TOLERANCE: f32 = 1e-4;
/// Error of a gradient tensor in the L2 norm, relative to its norm.
const GRADIENT_TOLERANCE: f64 = 1e-3;
/// The same for single elements of the gradients of `simple` at full width: a ReLU input within rounding of 0
/// may change sign, depending on the instruction set, and then changes single gradients of all earlier layers
/// by up to 5e-3 of the typical one. (In PyTorch an error of 3e-5 in the timestep embedding changes whole
/// tensors by 1e-2.) Norms stay within [`GRADIENT_TOLERANCE`], as does every element of the small network, in
/// which no input is so close to 0.
const RELU_TIE: f64 = 1e-2;
/// Relative error of a loss.
const LOSS_TOLERANCE: f64 = 1e-4;

struct Golden {
    bytes: Vec<u8>,
    about: Value,
}

impl Golden {
    fn open(network: &str) -> Self {
        let path = format!("{}/tests/golden/{network}.safetensors", env!("CARGO_MANIFEST_DIR"));
        let bytes = std::fs::read(path).expect("the golden file");
        let (_, header) = SafeTensors::read_metadata(&bytes).expect("a golden file");
        let about =
            serde_json::from_str(&header.metadata().as_ref().expect("metadata")["golden"]).expect("JSON");
        Self { bytes, about }
    }

    fn tensor(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let file = SafeTensors::deserialize(&self.bytes).expect("a golden file");
        let view = file.tensor(name).unwrap_or_else(|_| panic!("no {name}"));
        let data =
            view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        (view.shape().to_vec(), data)
    }

    /// An image tensor, channels last.
    fn images(&self, name: &str) -> Vec<f32> {
        let (shape, data) = self.tensor(name);
        let [n, c, h, w] = shape[..] else { panic!("{name} is no image tensor") };
        let mut out = Vec::with_capacity(data.len());
        for i in 0..n {
            for p in 0..h * w {
                out.extend((0..c).map(|ch| data[(i * c + ch) * h * w + p]));
            }
        }
        out
    }
}

fn list<T>(v: &Value, f: impl Fn(&Value) -> T) -> Vec<T> {
    v.as_array().expect("a list").iter().map(f).collect()
}

fn number(v: &Value) -> usize {
    v.as_u64().expect("a number") as usize
}

/// The network of a golden case. The attention network's settings have the reference's names there, the
/// others ours.
fn network(name: &str, about: &Value) -> Box<dyn Network> {
    let mut config = Config::default();
    let (kind, channels) = match name {
        "attention" => {
            let c = &about["config"];
            let settings = json!({
                "down_channels": c["down"], "mid_channels": c["mid"], "down_sample": c["resample"],
                "time_emb_dim": c["temb"], "num_down_layers": c["layers"][0], "num_mid_layers": c["layers"][1],
                "num_up_layers": c["layers"][2], "num_heads": c["heads"],
            });
            config.attention = serde_json::from_value(settings).expect("settings");
            (NetworkKind::Attention, number(&c["channels"]))
        }
        _ => {
            let mut section = match name {
                "simple" => json!(config.simple),
                "double-conv" => json!(config.double_conv),
                _ => json!(config.unet2d),
            };
            for (key, value) in about["settings"].as_object().expect("settings") {
                section[key] = value.clone();
            }
            if name == "double-conv" {
                section["dropout"] = json!(0.0);
            }
            let settings = "settings";
            let kind = match name {
                "simple" => {
                    config.simple = serde_json::from_value(section).expect(settings);
                    NetworkKind::Simple
                }
                "double-conv" => {
                    config.double_conv = serde_json::from_value(section).expect(settings);
                    NetworkKind::DoubleConv
                }
                _ => {
                    config.unet2d = serde_json::from_value(section).expect(settings);
                    NetworkKind::Unet2d
                }
            };
            (kind, number(&about["channels"]))
        }
    };
    config.network.name = kind;
    config.validate().expect("valid settings");
    config.build_network(channels)
}

/// The weights that the golden script samples for parameter `index` of the state dict.
fn weights(spec: &ParameterSpec, index: usize) -> Vec<f32> {
    let mut z = vec![0.0; spec.num_elements()];
    Stream::new(2026, Purpose::Test, 0, index as u32).fill_normal(&mut z);
    let fan_in: usize = spec.shape[1..].iter().product();
    let scale = 1.0 / (fan_in as f64).sqrt();
    let one = |z: f32| match spec.shape.len() {
        1 if spec.name.ends_with("weight") => (1.0 + 0.1 * f64::from(z)) as f32,
        1 => (0.1 * f64::from(z)) as f32,
        _ => (f64::from(z) * scale) as f32,
    };
    z.into_iter().map(one).collect()
}

struct Trained {
    graph: TrainingGraph,
    exec: CpuExecutor,
    /// The index of each parameter in the state dict.
    indices: Vec<usize>,
}

fn prepare(net: &dyn Network, names: &[String], shape: [usize; 4]) -> Trained {
    let schedule = Schedule::linear(1000, 1e-4, 0.02).expect("a schedule");
    let graph = TrainingGraph::new(net, &schedule, shape, NoiseSource::Given).expect("a graph");
    let mut exec = CpuExecutor::new(graph.graph.clone(), &graph.options(false), 0).expect("an executor");
    assert_eq!(graph.parameters.len(), names.len());
    let indices: Vec<usize> = graph
        .parameters
        .iter()
        .map(|p| {
            names.iter().position(|n| *n == p.name).unwrap_or_else(|| panic!("{} is no PyTorch name", p.name))
        })
        .collect();
    for (i, (spec, &index)) in graph.parameters.iter().zip(&indices).enumerate() {
        exec.write_parameter(Region::Weights, i, &spec.from_torch(&weights(spec, index))).expect("weights");
    }
    for (spec, t) in &graph.states {
        exec.write(*t, &vec![spec.value; spec.num_elements()]).expect("a state");
    }
    Trained { graph, exec, indices }
}

impl Trained {
    fn step(&mut self, x_0: &[f32], t: &[f32], eps: &[f32]) -> f64 {
        self.exec.write(self.graph.x_0, x_0).expect("images");
        self.exec.write(self.graph.t, t).expect("timesteps");
        self.exec.write(self.graph.eps, eps).expect("noise");
        self.exec.run(RngKey::default()).expect("a run");
        let mut loss = [0.0];
        self.exec.read(self.graph.loss, &mut loss).expect("the loss");
        f64::from(loss[0])
    }

    /// Parameter `i` of a region in PyTorch's layout.
    fn torch(&self, region: Region, i: usize) -> Vec<f32> {
        let spec = &self.graph.parameters[i];
        let mut data = vec![0.0; spec.num_elements()];
        self.exec.read_parameter(region, i, &mut data).expect("a parameter");
        spec.to_torch(&data)
    }
}

/// Runs a case's network once. The graph takes x_0, so it gets the one that the forward process turns into
/// the golden x_t.
fn run_network(golden: &Golden, name: &str, case: &str) -> (Trained, f64, Vec<f32>) {
    let about = &golden.about[case];
    let net = network(name, about);
    let shape = [number(&about["batch"]), number(&about["height"]), number(&about["width"]), net.channels()];
    let names = list(&about["names"], |v| v.as_str().expect("a name").to_owned());
    let t: Vec<f32> = list(&about["t"], |v| number(v) as f32);
    let mut trained = prepare(&*net, &names, shape);
    assert_eq!(trained.graph.graph.parameter_count(), number(&about["parameters"]), "{name} {case}");
    if let Some(label) = trained.graph.label {
        let labels = list(&about["labels"], |v| number(v) as f32);
        trained.exec.write(label, &labels).expect("classes");
    }
    // x_t = a x_0 + b eps: find the x_0 that gives the golden x_t.
    let schedule = Schedule::linear(1000, 1e-4, 0.02).expect("a schedule");
    let (x_t, eps) = (golden.images(&format!("{case}/x")), golden.images(&format!("{case}/eps")));
    let image = x_t.len() / shape[0];
    let x_0: Vec<f32> = (0..x_t.len())
        .map(|i| {
            let a = schedule.alpha_bar(t[i / image] as usize);
            ((f64::from(x_t[i]) - (1.0 - a).sqrt() * f64::from(eps[i])) / a.sqrt()) as f32
        })
        .collect();
    let loss = trained.step(&x_0, &t, &eps);
    let mut y = vec![0.0; x_t.len()];
    trained.exec.read(trained.graph.prediction, &mut y).expect("the prediction");
    (trained, loss, y)
}

fn check_output(golden: &Golden, case: &str, loss: f64, y: &[f32]) {
    let want = golden.images(&format!("{case}/y"));
    let scale = want.iter().fold(0f32, |m, v| m.max(v.abs()));
    let worst = y.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max) / scale;
    println!("{case}: output off by {worst:.2e} of its largest magnitude");
    assert!(worst <= OUTPUT_TOLERANCE, "{case}: output off by {worst:.2e}");
    let want = f64::from(golden.tensor(&format!("{case}/loss")).1[0]);
    assert!((loss / want - 1.0).abs() <= LOSS_TOLERANCE, "{case}: loss {loss}, PyTorch {want}");
}

/// Gradients that are zero in theory and rounding errors in practice: the bias of attention keys shifts all
/// scores of a query equally.
fn has_no_gradient(name: &str) -> bool {
    name.ends_with("to_k.bias")
}

/// A case that has every gradient.
fn check_small(name: &str, case: &str) {
    let golden = Golden::open(name);
    let (trained, loss, y) = run_network(&golden, name, case);
    check_output(&golden, case, loss, &y);
    let mut worst = (0.0, String::new());
    for (i, spec) in trained.graph.parameters.iter().enumerate() {
        let (shape, want) = golden.tensor(&format!("{case}/grad/{}", spec.name));
        assert_eq!(shape, spec.shape, "{}", spec.name);
        let got = trained.torch(Region::Gradients, i);
        if has_no_gradient(&spec.name) {
            assert!(got.iter().all(|g| g.abs() < 1e-6), "{name} {case}: {} has a gradient", spec.name);
            continue;
        }
        let error = relative_error(&got, &want);
        assert!(error <= GRADIENT_TOLERANCE, "{name} {case}: {}: gradient off by {error:.2e}", spec.name);
        if error > worst.0 {
            worst = (error, spec.name.clone());
        }
    }
    println!("{name} {case}: worst gradient {worst:?}");
}

fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut got.iter().zip(want).map(|(a, b)| f64::from(a - b)));
    difference / norm(&mut want.iter().map(|&v| f64::from(v)))
}

/// The flat indices at which the golden script sampled a tensor of `n` elements.
fn samples(n: usize) -> impl Iterator<Item = usize> {
    (0..8).map(move |j| 104_729 * (j + 1) % n)
}

/// Checks a case with sampled gradients, whose network has this many parameters.
fn check_large(name: &str, case: &str, parameters: usize) {
    let golden = Golden::open(name);
    let (trained, loss, y) = run_network(&golden, name, case);
    assert_eq!(trained.graph.graph.parameter_count(), parameters);
    check_output(&golden, case, loss, &y);
    let (_, norms) = golden.tensor(&format!("{case}/grad_norm"));
    let (_, sampled) = golden.tensor(&format!("{case}/grad_samples"));
    for (i, spec) in trained.graph.parameters.iter().enumerate() {
        if has_no_gradient(&spec.name) {
            continue;
        }
        let (got, index) = (trained.torch(Region::Gradients, i), trained.indices[i]);
        let norm = got.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        let want = f64::from(norms[index]);
        assert!(
            (norm / want - 1.0).abs() <= GRADIENT_TOLERANCE,
            "{name} {}: norm {norm}, PyTorch {want}",
            spec.name
        );
        // Errors are relative to the tensor's typical element: single gradients may cancel to zero.
        let typical = want / (got.len() as f64).sqrt();
        for (j, at) in samples(got.len()).enumerate() {
            let (g, w) = (f64::from(got[at]), f64::from(sampled[index * 8 + j]));
            let off = (g - w).abs() / typical.max(w.abs());
            let tolerance = if name == "simple" { RELU_TIE } else { GRADIENT_TOLERANCE };
            assert!(off <= tolerance, "{name} {}[{at}]: {g}, PyTorch {w}", spec.name);
        }
    }
}

/// Checks 20 Adam steps with the golden script's noise: the losses and the final norms of the parameters.
fn check_steps(name: &str, golden: &Golden, net: &dyn Network, about: &Value, want: (&str, &str)) -> Trained {
    let names: Vec<String> = list(&about["names"], |v| v.as_str().expect("a name").to_owned());
    let side = |key: &str| about[key].as_u64().map_or(28, |v| v as usize);
    let shape = [number(&about["batch"]), side("height"), side("width"), net.channels()];
    let len: usize = shape[1..].iter().product();
    let mut trained = prepare(net, &names, shape);
    let (_, losses) = golden.tensor(want.0);
    let draw = |step: u32, i: usize| {
        let mut z = vec![0.0; len];
        Stream::new(2026, Purpose::Test, step, i as u32).fill_normal(&mut z);
        z
    };
    let mut worst = 0f64;
    for (k, &want) in losses.iter().enumerate() {
        let k = k as u32;
        let x_0: Vec<f32> =
            (0..shape[0]).flat_map(|i| draw(1000 + k, i)).map(|z| (z * 0.5).clamp(-1.0, 1.0)).collect();
        let eps: Vec<f32> = (0..shape[0]).flat_map(|i| draw(2000 + k, i)).collect();
        let word = |i: usize| Stream::new(2026, Purpose::Test, 3000 + k, i as u32).word(0);
        let t: Vec<f32> = (0..shape[0]).map(|i| below(word(i), 1000) as f32).collect();
        let loss = trained.step(&x_0, &t, &eps);
        let error = (loss / f64::from(want) - 1.0).abs();
        worst = worst.max(error);
        assert!(error <= LOSS_TOLERANCE, "{name}, step {k}: loss {loss}, PyTorch {want}");
        let step = AdamStep {
            lr: about["lr"].as_f64().unwrap_or(1e-4),
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            decoupled: false,
            step: u64::from(k) + 1,
            ema_decay: 0.0,
            grad_scale: 1.0,
        };
        trained.exec.update(&step).expect("an update");
    }
    println!("{name}: losses off by at most {worst:.2e}");
    let (_, norms) = golden.tensor(want.1);
    for (i, spec) in trained.graph.parameters.iter().enumerate() {
        // Adam steps on pure rounding errors never agree between two implementations.
        if spec.name.ends_with("in_proj_bias") || has_no_gradient(&spec.name) {
            continue;
        }
        let got = trained.torch(Region::Weights, i);
        let norm = got.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        let want = f64::from(norms[trained.indices[i]]);
        assert!((norm / want - 1.0).abs() <= LOSS_TOLERANCE, "{}: norm {norm}, PyTorch {want}", spec.name);
    }
    trained
}

/// [`check_steps`], and the trained network's output with running statistics and without dropout.
fn check_default_steps(name: &str) {
    let golden = Golden::open(name);
    let about = &golden.about["steps"];
    let net = network(name, about);
    let trained = check_steps(name, &golden, &*net, about, ("steps/loss", "steps/norm"));
    let mut weights: Vec<NamedTensor> = (trained.graph.parameters.iter().enumerate())
        .map(|(i, spec)| NamedTensor {
            name: spec.name.clone(),
            shape: spec.shape.clone(),
            data: trained.torch(Region::Weights, i),
        })
        .collect();
    let running: Vec<String> = list(&about["running"], |v| v.as_str().expect("a name").to_owned());
    for (spec, t) in &trained.graph.states {
        let mut data = vec![0.0; spec.num_elements()];
        trained.exec.read(*t, &mut data).expect("a state");
        match running.iter().position(|n| *n == spec.name) {
            Some(index) => {
                let norm = data.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
                let want = f64::from(golden.tensor("steps/running").1[index]);
                assert!(
                    (norm / want - 1.0).abs() <= GRADIENT_TOLERANCE,
                    "{}: {norm}, PyTorch {want}",
                    spec.name
                );
            }
            None => assert_eq!(data, [20.0], "{} counts the batches", spec.name),
        }
        weights.push(NamedTensor { name: spec.name.clone(), shape: spec.shape.clone(), data });
    }
    let shape = [1, number(&about["height"]), number(&about["width"]), net.channels()];
    let mut model = Model::new(&*net, shape, 0).expect("a model");
    model.set_weights(&weights, Path::new("trained")).expect("the network's weights");
    let mut x = vec![0.0; shape.iter().product()];
    Stream::new(2026, Purpose::Test, 1, 0).fill_normal(&mut x);
    let mut y = vec![0.0; x.len()];
    model.predict(&x, 500.0, &mut y).expect("a prediction");
    let want = golden.images("steps/eval");
    let scale = want.iter().fold(0f32, |m, v| m.max(v.abs()));
    let worst = y.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max) / scale;
    println!("{name}: sampling output after 20 steps off by {worst:.2e} of its largest magnitude");
    // Weights that Adam updated by rounding errors contribute: for `simple`, PyTorch's f32 is 7.4e-4 away
    // from its own f64.
    assert!(worst <= 1e-3, "{name}: sampling output off by {worst:.2e}");
}

#[test]
fn small_networks_agree_in_output_and_all_gradients() {
    check_small("attention", "tiny");
    check_small("simple", "tiny");
}

#[test]
fn unet2d_agrees_with_every_option() {
    for case in ["plain", "options", "mish"] {
        check_small("unet2d", case);
    }
}

#[test]
fn attention_agrees_at_its_default_settings() {
    check_large("attention", "default", 10_188_081);
    let golden = Golden::open("attention");
    let mut about = golden.about["adam20"].clone();
    about["names"] = golden.about["default"]["names"].clone();
    let net = network("attention", &about);
    check_steps("attention", &golden, &*net, &about, ("adam20/loss_f64", "adam20/norm_f64"));
}

#[test]
fn simple_agrees_at_its_default_settings() {
    check_large("simple", "default", 62_437_601);
    check_default_steps("simple");
}

#[test]
fn double_conv_agrees_at_its_default_settings() {
    check_large("double-conv", "default", 23_563_011);
    check_default_steps("double-conv");
}

#[test]
fn unet2d_agrees_at_its_default_settings() {
    check_large("unet2d", "default", 35_746_307);
    check_default_steps("unet2d");
}
