//! Training steps of every network as built by `ddpm`, against the CPU executor.

use crate::table::Make;
use ddpm::config::Config;
use ddpm::model::{NoiseSource, TrainingGraph};
use ddpm_engine::{ComputeOptions, Executor, PlanOptions, Region, RngKey};
use ddpm_engine_cpu::CpuExecutor;
use ddpm_rng::{Purpose, Stream};

/// A name, and settings that make its network small.
type Small = (&'static str, &'static [(&'static str, &'static str)]);

const SMALL: [Small; 6] = [
    (
        "attention",
        &[
            ("network.name", "attention"),
            ("attention.down_channels", "8, 16, 16"),
            ("attention.mid_channels", "16, 16"),
            ("attention.down_sample", "true, false"),
            ("attention.num_heads", "2"),
            ("attention.num_down_layers", "1"),
            ("attention.num_class_embeds", "3"),
            ("diffusion.prediction", "v"),
        ],
    ),
    (
        "simple",
        &[
            ("network.name", "simple"),
            ("simple.widths", "8, 16, 24"),
            ("loss.name", "l1"),
            ("loss.offset_noise", "0.1"),
            ("loss.input_perturbation", "0.1"),
        ],
    ),
    (
        "double-conv",
        &[("network.name", "double-conv"), ("double_conv.base_channels", "8"), ("loss.name", "huber")],
    ),
    (
        "unet2d",
        &[
            ("network.name", "unet2d"),
            ("unet2d.block_out_channels", "8, 16"),
            ("unet2d.down_block_types", "[\"DownBlock2D\", \"AttnDownBlock2D\"]"),
            ("unet2d.up_block_types", "[\"AttnUpBlock2D\", \"UpBlock2D\"]"),
            ("unet2d.norm_num_groups", "4"),
            ("unet2d.layers_per_block", "1"),
            ("unet2d.dropout", "0.1"),
            ("loss.weighting", "min-snr"),
        ],
    ),
    (
        "unet2d with its options",
        &[
            ("network.name", "unet2d"),
            ("unet2d.block_out_channels", "8, 16"),
            ("unet2d.down_block_types", "[\"AttnDownBlock2D\", \"DownBlock2D\"]"),
            ("unet2d.up_block_types", "[\"UpBlock2D\", \"AttnUpBlock2D\"]"),
            ("unet2d.norm_num_groups", "4"),
            ("unet2d.layers_per_block", "1"),
            ("unet2d.attention_head_dim", "8"),
            ("unet2d.downsample_type", "resnet"),
            ("unet2d.upsample_type", "resnet"),
            ("unet2d.resnet_time_scale_shift", "scale_shift"),
            ("unet2d.act_fn", "mish"),
            ("unet2d.flip_sin_to_cos", "true"),
            ("unet2d.center_input_sample", "true"),
        ],
    ),
    (
        "attention in bf16",
        &[
            ("network.name", "attention"),
            ("attention.down_channels", "8, 16, 16"),
            ("attention.mid_channels", "16, 16"),
            ("attention.down_sample", "true, false"),
            ("attention.num_heads", "4"),
            ("attention.num_mid_layers", "1"),
            ("compute.precision", "bf16"),
        ],
    ),
];

/// Compares loss and gradients of every small network; each element may differ by `tolerance` of its tensor's largest (in bf16,
/// by 0.1 of it).
pub fn agree(tolerance: f32, make: Make<'_>) {
    for (name, settings) in SMALL {
        let pairs: Vec<_> = settings.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
        let config = Config::load(None, None, &pairs).unwrap_or_else(|e| panic!("{name}: {e}"));
        let schedule = config.schedule().expect("a schedule");
        let net = config.build_network(3);
        let shape = [2, 16, 16, 3];
        let objective = config.objective();
        let graph = TrainingGraph::with_objective(&*net, &schedule, shape, NoiseSource::Random, objective)
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        let run = |mut exec: Box<dyn Executor>| -> Vec<(String, Vec<f32>)> {
            for (i, spec) in graph.parameters.iter().enumerate() {
                exec.write_parameter(Region::Weights, i, &spec.init(3, i)).expect("its length");
            }
            for (spec, t) in &graph.states {
                exec.write(*t, &vec![spec.value; spec.num_elements()]).expect("its length");
            }
            let mut images = vec![0.0; shape.iter().product()];
            Stream::new(1, Purpose::Test, 0, 0).fill_normal(&mut images);
            exec.write(graph.x_0, &images).expect("its length");
            if let Some(label) = graph.label {
                exec.write(label, &[2.0, -1.0]).expect("its length");
            }
            exec.run(RngKey { seed: 5, step: 9, first_index: 0 }).unwrap_or_else(|e| panic!("{name}: {e}"));
            let mut seen = Vec::new();
            for (what, t) in [("loss", graph.loss), ("prediction", graph.prediction)] {
                let mut x = vec![f32::NAN; graph.graph.shape(t).len()];
                exec.read(t, &mut x).expect("its length");
                seen.push((what.to_owned(), x));
            }
            for (i, spec) in graph.parameters.iter().enumerate() {
                let mut x = vec![f32::NAN; graph.graph.shape(graph.graph.parameters()[i]).len()];
                exec.read_parameter(Region::Gradients, i, &mut x).expect("its length");
                seen.push((format!("gradient of {}", spec.name), x));
            }
            for (spec, t) in &graph.states {
                let mut x = vec![f32::NAN; spec.num_elements()];
                exec.read(*t, &mut x).expect("its length");
                seen.push((spec.name.clone(), x));
            }
            seen
        };
        let options = PlanOptions { compute: config.compute.options(), ..graph.options(true) };
        let plain = ComputeOptions { winograd: false, ..ComputeOptions::default() };
        let on_cpu = PlanOptions { compute: plain, ..options.clone() };
        let want = run(Box::new(CpuExecutor::new(graph.graph.clone(), &on_cpu, 1).expect("a small plan")));
        let got = run(make(graph.graph.clone(), &options));
        let tolerance = if options.compute == ComputeOptions::default() { tolerance } else { 0.1 };
        let largest = want.iter().flat_map(|(_, x)| x).fold(0f32, |m, v| m.max(v.abs()));
        for ((what, got), (_, want)) in got.iter().zip(&want) {
            // A gradient that is zero up to rounding has no relative precision.
            let scale = want.iter().fold(1e-4 * largest, |m, v| m.max(v.abs()));
            let worst = got
                .iter()
                .zip(want)
                .map(|(g, w)| (g - w).abs())
                .fold(0f32, |m, d| if d <= m { m } else { d });
            assert!(
                worst <= tolerance * scale,
                "{name}: {what} off by {worst:.2e}, the largest is {scale:.2e}"
            );
        }
    }
}
