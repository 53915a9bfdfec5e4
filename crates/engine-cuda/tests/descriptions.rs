//! Describes the library operations of the networks' plans to the real cuDNN and cuBLASLt, which needs no GPU. Skipped, with a
//! message, if they are not found (docs/cuda.md says where to get them).

use ddpm::config::Config;
use ddpm::model::{NoiseSource, TrainingGraph};
use ddpm_engine::{Graph, PlanOptions};
use ddpm_engine_cuda::executor::library_ops;
use ddpm_engine_cuda::installed::{check_description, cublaslt_version, cudnn_version};
use ddpm_engine_cuda::library::{ConvPass, Libraries, Library};
use ddpm_engine_cuda::lower::CudaOptions;
use std::collections::HashMap;

const NETWORKS: [&str; 4] = ["attention", "simple", "double-conv", "unet2d"];

/// A training plan of a network at its default sizes.
fn training_plan(network: &str, precision: &str) -> (Graph, PlanOptions) {
    let pairs = [("network.name", network), ("compute.precision", precision)];
    let pairs = pairs.map(|(k, v)| (k.to_owned(), v.to_owned()));
    let config = Config::load(None, None, &pairs).expect("settings");
    let schedule = config.schedule().expect("a schedule");
    let (net, objective) = (config.build_network(3), config.objective());
    let graph =
        TrainingGraph::with_objective(&*net, &schedule, [8, 32, 32, 3], NoiseSource::Random, objective)
            .expect("a training graph");
    let options = PlanOptions { compute: config.compute.options(), ..graph.options(true) };
    (graph.graph, options)
}

#[test]
fn libraries_accept_the_networks_operations() {
    let mut available = HashMap::new();
    for (library, version) in [(Library::Cudnn, cudnn_version()), (Library::CublasLt, cublaslt_version())] {
        match version {
            Ok(version) => drop(available.insert(library, version)),
            Err(reason) => println!("skipped: {library:?}: {reason}"),
        }
    }
    let mut seen: HashMap<(Library, ConvPass), usize> = HashMap::new();
    for precision in ["f32", "tf32", "bf16"] {
        for name in NETWORKS {
            let (graph, options) = training_plan(name, precision);
            let cuda_options = CudaOptions {
                tf32: precision == "tf32",
                libraries: Libraries::Timed,
                ..CudaOptions::default()
            };
            let found = library_ops(graph, &options, cuda_options).expect("a plan");
            assert!(!found.is_empty(), "{name} in {precision}");
            for op in found {
                *seen.entry((op.library, op.pass)).or_default() += 1;
                if available.contains_key(&op.library) {
                    check_description(&op).unwrap_or_else(|e| panic!("{name}: {op:?}: {e}"));
                }
            }
        }
    }
    assert_eq!(seen.len(), 6, "{seen:?}");
    println!("{seen:?} described to {available:?}");
}
