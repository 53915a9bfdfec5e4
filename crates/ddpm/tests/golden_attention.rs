//! The attention U-Net against PyTorch's numbers (`tools/golden/attention.py`): output, loss, all gradients, and the
//! losses of 20 Adam steps.

use ddpm::model::{StepDraws, TrainingGraph};
use ddpm::nets::{AttentionUnet, ParameterSpec};
use ddpm::schedule::Schedule;
use ddpm_engine::rng::{Purpose, Stream, below};
use ddpm_engine::{AdamStep, CpuExecutor, Draws, Executor, Region};
use safetensors::SafeTensors;
use serde_json::Value;

/// Largest error of the output, relative to its largest number.
const OUTPUT_TOLERANCE: f32 = 1e-4;
/// Error of a gradient tensor in the L2 norm, relative to its norm.
const GRADIENT_TOLERANCE: f64 = 1e-3;
/// Relative error of a loss.
const LOSS_TOLERANCE: f64 = 1e-4;

struct Golden {
    bytes: Vec<u8>,
    about: Value,
}

impl Golden {
    fn open() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/attention.safetensors");
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

    /// A picture tensor, channels last.
    fn pictures(&self, name: &str) -> Vec<f32> {
        let (shape, data) = self.tensor(name);
        let [n, c, h, w] = shape[..] else { panic!("{name} is no picture tensor") };
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

fn network(about: &Value) -> AttentionUnet {
    let c = &about["config"];
    let layers = list(&c["layers"], number);
    AttentionUnet {
        im_channels: number(&c["channels"]),
        down_channels: list(&c["down"], number),
        mid_channels: list(&c["mid"], number),
        down_sample: list(&c["resample"], |v| v.as_bool().expect("a bool")),
        time_emb_dim: number(&c["temb"]),
        num_down_layers: layers[0],
        num_mid_layers: layers[1],
        num_up_layers: layers[2],
        num_heads: number(&c["heads"]),
    }
}

/// The weights that the golden script draws for parameter `index` of the state dict.
fn weights(spec: &ParameterSpec, index: usize) -> Vec<f32> {
    let mut z = vec![0.0; spec.numbers()];
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
    /// For each parameter its place in the state dict.
    places: Vec<usize>,
}

fn prepare(about: &Value, names: &[String], shape: [usize; 4]) -> Trained {
    let schedule = Schedule::linear(1000, 1e-4, 0.02).expect("a schedule");
    let graph = TrainingGraph::new(&network(about), &schedule, shape, StepDraws::Given).expect("a graph");
    let mut exec = CpuExecutor::new(graph.graph.clone(), &graph.options(false), 0).expect("an executor");
    assert_eq!(graph.parameters.len(), names.len());
    let places: Vec<usize> = graph
        .parameters
        .iter()
        .map(|p| {
            names.iter().position(|n| *n == p.name).unwrap_or_else(|| panic!("{} is no PyTorch name", p.name))
        })
        .collect();
    for (i, (spec, &place)) in graph.parameters.iter().zip(&places).enumerate() {
        exec.write_parameter(Region::Weights, i, &spec.from_torch(&weights(spec, place))).expect("weights");
    }
    Trained { graph, exec, places }
}

impl Trained {
    fn step(&mut self, x_0: &[f32], t: &[f32], eps: &[f32]) -> f64 {
        self.exec.write(self.graph.x_0, x_0).expect("pictures");
        self.exec.write(self.graph.t, t).expect("timesteps");
        self.exec.write(self.graph.eps, eps).expect("noise");
        self.exec.run(Draws::default()).expect("a run");
        let mut loss = [0.0];
        self.exec.read(self.graph.loss, &mut loss).expect("the loss");
        f64::from(loss[0])
    }

    /// Parameter `i` of a region in PyTorch's layout.
    fn torch(&self, region: Region, i: usize) -> Vec<f32> {
        let spec = &self.graph.parameters[i];
        let mut data = vec![0.0; spec.numbers()];
        self.exec.read_parameter(region, i, &mut data).expect("a parameter");
        spec.to_torch(&data)
    }
}

/// Runs a case's network once. The graph takes x_0, so the one that the forward process turns into the golden x_t is
/// given.
fn run_network(golden: &Golden, case: &str) -> (Trained, f64, Vec<f32>) {
    let about = &golden.about[case];
    let shape = [
        number(&about["batch"]),
        number(&about["height"]),
        number(&about["width"]),
        number(&about["config"]["channels"]),
    ];
    let names = list(&about["names"], |v| v.as_str().expect("a name").to_owned());
    let t: Vec<f32> = list(&about["t"], |v| number(v) as f32);
    let mut trained = prepare(about, &names, shape);
    // x_t = a x_0 + b eps: find the x_0 that gives the golden x_t.
    let schedule = Schedule::linear(1000, 1e-4, 0.02).expect("a schedule");
    let (x_t, eps) = (golden.pictures(&format!("{case}/x")), golden.pictures(&format!("{case}/eps")));
    let picture = x_t.len() / shape[0];
    let x_0: Vec<f32> = (0..x_t.len())
        .map(|i| {
            let a = schedule.alpha_bar(t[i / picture] as usize);
            ((f64::from(x_t[i]) - (1.0 - a).sqrt() * f64::from(eps[i])) / a.sqrt()) as f32
        })
        .collect();
    let loss = trained.step(&x_0, &t, &eps);
    let mut y = vec![0.0; x_t.len()];
    trained.exec.read(trained.graph.prediction, &mut y).expect("the prediction");
    (trained, loss, y)
}

fn check_output(golden: &Golden, case: &str, loss: f64, y: &[f32]) {
    let want = golden.pictures(&format!("{case}/y"));
    let scale = want.iter().fold(0f32, |m, v| m.max(v.abs()));
    let worst = y.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max) / scale;
    println!("{case}: output off by {worst:.2e} of its largest number");
    assert!(worst <= OUTPUT_TOLERANCE, "{case}: output off by {worst:.2e}");
    let want = f64::from(golden.tensor(&format!("{case}/loss")).1[0]);
    assert!((loss / want - 1.0).abs() <= LOSS_TOLERANCE, "{case}: loss {loss}, PyTorch {want}");
}

#[test]
fn a_small_network_agrees_in_output_and_all_gradients() {
    let golden = Golden::open();
    let (trained, loss, y) = run_network(&golden, "tiny");
    check_output(&golden, "tiny", loss, &y);
    let mut worst = (0.0, String::new());
    for (i, spec) in trained.graph.parameters.iter().enumerate() {
        let (shape, want) = golden.tensor(&format!("tiny/grad/{}", spec.name));
        assert_eq!(shape, spec.shape, "{}", spec.name);
        let error = relative_error(&trained.torch(Region::Gradients, i), &want);
        assert!(error <= GRADIENT_TOLERANCE, "{}: gradient off by {error:.2e}", spec.name);
        if error > worst.0 {
            worst = (error, spec.name.clone());
        }
    }
    println!("tiny: worst gradient {worst:?}");
}

fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut got.iter().zip(want).map(|(a, b)| f64::from(a - b)));
    difference / norm(&mut want.iter().map(|&v| f64::from(v)))
}

/// The flat indices at which the golden script took samples of a tensor of `n` numbers.
fn samples(n: usize) -> impl Iterator<Item = usize> {
    (0..8).map(move |j| 104_729 * (j + 1) % n)
}

#[test]
fn the_default_network_agrees_in_output_and_gradients() {
    let golden = Golden::open();
    let (trained, loss, y) = run_network(&golden, "default");
    assert_eq!(trained.graph.graph.parameter_count(), 10_188_081);
    check_output(&golden, "default", loss, &y);
    let (_, norms) = golden.tensor("default/grad_norm");
    let (_, sampled) = golden.tensor("default/grad_samples");
    for (i, spec) in trained.graph.parameters.iter().enumerate() {
        let (got, place) = (trained.torch(Region::Gradients, i), trained.places[i]);
        let norm = got.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        let want = f64::from(norms[place]);
        assert!(
            (norm / want - 1.0).abs() <= GRADIENT_TOLERANCE,
            "{}: norm {norm}, PyTorch {want}",
            spec.name
        );
        // A sample is compared with the tensor's typical number: single gradients may cancel to nothing.
        let typical = want / (got.len() as f64).sqrt();
        for (j, at) in samples(got.len()).enumerate() {
            let (g, w) = (f64::from(got[at]), f64::from(sampled[place * 8 + j]));
            let off = (g - w).abs() / typical.max(w.abs());
            assert!(off <= GRADIENT_TOLERANCE, "{}[{at}]: {g}, PyTorch {w}", spec.name);
        }
    }
}

#[test]
fn twenty_adam_steps_have_pytorchs_losses() {
    let golden = Golden::open();
    let about = &golden.about["adam20"];
    let names: Vec<String> =
        list(&golden.about["default"]["names"], |v| v.as_str().expect("a name").to_owned());
    let batch = number(&about["batch"]);
    let mut trained = prepare(about, &names, [batch, 28, 28, 1]);
    let (_, want) = golden.tensor("adam20/loss_f64");
    let draw = |step: u32, i: usize| {
        let mut z = vec![0.0; 784];
        Stream::new(2026, Purpose::Test, step, i as u32).fill_normal(&mut z);
        z
    };
    let mut worst = 0f64;
    for (k, &want) in want.iter().enumerate() {
        let k = k as u32;
        let x_0: Vec<f32> =
            (0..batch).flat_map(|i| draw(1000 + k, i)).map(|z| (z * 0.5).clamp(-1.0, 1.0)).collect();
        let eps: Vec<f32> = (0..batch).flat_map(|i| draw(2000 + k, i)).collect();
        let word = |i: usize| Stream::new(2026, Purpose::Test, 3000 + k, i as u32).word(0);
        let t: Vec<f32> = (0..batch).map(|i| below(word(i), 1000) as f32).collect();
        assert_eq!(t, list(&about["t"][k as usize], |v| number(v) as f32));
        let loss = trained.step(&x_0, &t, &eps);
        let error = (loss / f64::from(want) - 1.0).abs();
        worst = worst.max(error);
        assert!(error <= LOSS_TOLERANCE, "step {k}: loss {loss}, PyTorch {want}");
        let step = AdamStep {
            lr: 1e-4,
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
    println!("adam20: losses off by at most {worst:.2e}");
    let (_, norms) = golden.tensor("adam20/norm_f64");
    for (i, spec) in trained.graph.parameters.iter().enumerate() {
        // The bias of an attention's keys shifts all scores of a query alike: its gradient is zero, and what Adam makes
        // of the rounding errors in its place agrees between no two programs.
        if spec.name.ends_with("in_proj_bias") {
            continue;
        }
        let got = trained.torch(Region::Weights, i);
        let norm = got.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        let want = f64::from(norms[trained.places[i]]);
        assert!((norm / want - 1.0).abs() <= LOSS_TOLERANCE, "{}: norm {norm}, PyTorch {want}", spec.name);
    }
}
