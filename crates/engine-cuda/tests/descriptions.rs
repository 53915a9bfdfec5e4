//! The products that the networks' plans ask libraries for, described to the real cuDNN and cuBLASLt, which needs no GPU.
//! Skipped, with a line, where they are not found (docs/cuda.md says where they come from).

use ddpm::model::{NoiseSource, TrainingGraph};
use ddpm::nets;
use ddpm::objective::Objective;
use ddpm::schedule::Schedule;
use ddpm::train::config::Config;
use ddpm_engine::{Graph, PlanOptions};
use ddpm_engine_cuda::executor::products;
use ddpm_engine_cuda::library::{
    Kind, Libraries, Library, check_description, cublaslt_version, cudnn_version,
};
use ddpm_engine_cuda::translate::Choices;
use std::collections::HashMap;

const NETWORKS: [&str; 4] = ["attention", "simple", "double-conv", "unet2d"];

/// A training plan of a network with its own sizes.
fn plan(network: &str, precision: &str) -> (Graph, PlanOptions) {
    let pairs = [("network.name", network), ("train.precision", precision)];
    let pairs = pairs.map(|(k, v)| (k.to_owned(), v.to_owned()));
    let config = Config::load(None, None, &pairs).expect("settings");
    let schedule = Schedule::from_config(&config.diffusion).expect("a schedule");
    let (net, objective) = (nets::from_config(&config, 3), Objective::from_config(&config));
    let graph =
        TrainingGraph::with_objective(&*net, &schedule, [8, 32, 32, 3], NoiseSource::Drawn, objective)
            .expect("a training graph");
    let options = PlanOptions { arithmetic: config.train.arithmetic(), ..graph.options(true) };
    (graph.graph, options)
}

#[test]
fn libraries_understand_the_networks_products() {
    let mut there = HashMap::new();
    for (library, version) in [(Library::Cudnn, cudnn_version()), (Library::CublasLt, cublaslt_version())] {
        match version {
            Ok(version) => drop(there.insert(library, version)),
            Err(reason) => println!("skipped: {library:?}: {reason}"),
        }
    }
    let mut seen: HashMap<(Library, Kind), usize> = HashMap::new();
    for precision in ["f32", "tf32", "bf16"] {
        for name in NETWORKS {
            let (graph, options) = plan(name, precision);
            let choices =
                Choices { tf32: precision == "tf32", libraries: Libraries::Timed, ..Choices::default() };
            let found = products(graph, &options, choices).expect("a plan");
            assert!(!found.is_empty(), "{name} in {precision}");
            for product in found {
                *seen.entry((product.library, product.kind)).or_default() += 1;
                if there.contains_key(&product.library) {
                    check_description(&product).unwrap_or_else(|e| panic!("{name}: {product:?}: {e}"));
                }
            }
        }
    }
    assert_eq!(seen.len(), 6, "{seen:?}");
    println!("{seen:?} described to {there:?}");
}
