//! The tensors of an executor in PyTorch's names and layouts.

use crate::checkpoint::{NamedTensor, check_fits};
use crate::error::Result;
use crate::nets::{ParameterSpec, StateSpec};
use ddpm_engine::{Executor, Region, Tensor};
use rayon::prelude::*;
use std::collections::HashMap;
use std::path::Path;

/// Number of parameters converted to the engine's layout in parallel.
const PARALLEL_CHUNK: usize = 16;

/// All parameters and states as tensors with PyTorch's names, shapes and layouts; the parameters from `region`.
pub(crate) fn read_tensors(
    exec: &dyn Executor,
    parameters: &[ParameterSpec],
    states: &[(StateSpec, Tensor)],
    region: Region,
) -> Result<Vec<NamedTensor>> {
    let mut tensors = Vec::with_capacity(parameters.len() + states.len());
    // Memory for all parameters in the engine's layout, one after the other: fresh memory costs more than the copies.
    let mut engine = vec![0.0; parameters.iter().map(ParameterSpec::num_elements).max().unwrap_or(0)];
    for (i, spec) in parameters.iter().enumerate() {
        let engine = &mut engine[..spec.num_elements()];
        exec.read_parameter(region, i, engine)?;
        let data = spec.to_torch(engine);
        tensors.push(NamedTensor { name: spec.name.clone(), shape: spec.shape.clone(), data });
    }
    for (spec, t) in states {
        let mut data = vec![0.0; spec.num_elements()];
        exec.read(*t, &mut data)?;
        tensors.push(NamedTensor { name: spec.name.clone(), shape: spec.shape.clone(), data });
    }
    Ok(tensors)
}

/// Writes tensors in that format, in any order, to `regions`; `origin` names them in errors.
pub(crate) fn load_tensors(
    exec: &mut dyn Executor,
    parameters: &[ParameterSpec],
    states: &[(StateSpec, Tensor)],
    regions: &[Region],
    tensors: &[NamedTensor],
    origin: &Path,
) -> Result<()> {
    let of_parameters = parameters.iter().map(|p| (p.name.clone(), p.shape.clone()));
    let of_states = states.iter().map(|(s, _)| (s.name.clone(), s.shape.clone()));
    check_fits(&of_parameters.chain(of_states).collect::<Vec<_>>(), tensors, origin)?;
    let by_name: HashMap<&str, &NamedTensor> = tensors.iter().map(|t| (t.name.as_str(), t)).collect();
    // A few in parallel; all at once would double the memory.
    for (chunk, specs) in parameters.chunks(PARALLEL_CHUNK).enumerate() {
        let data = specs.par_iter().map(|spec| spec.from_torch(&by_name[spec.name.as_str()].data));
        for (i, data) in data.collect::<Vec<_>>().iter().enumerate() {
            for &region in regions {
                exec.write_parameter(region, chunk * PARALLEL_CHUNK + i, data)?;
            }
        }
    }
    for (spec, t) in states {
        exec.write(*t, &by_name[spec.name.as_str()].data)?;
    }
    Ok(())
}
