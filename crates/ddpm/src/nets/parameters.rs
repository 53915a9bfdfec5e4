//! PyTorch's view of parameters: names, shapes, layouts and initialisation.

use ddpm_engine::Shape;
use ddpm_rng::{Purpose, Stream};
use rayon::prelude::*;

/// Output channels that are converted at once: a cache line of f32.
const OUTPUTS: usize = 16;

/// How a parameter's PyTorch layout relates to the engine's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// The same.
    Plain,
    /// A convolution `[out, in, kh, kw]`, or a transposed one `[in, out, kh, kw]`, to `[kh, kw, in, out]` of the
    /// convolution whose transpose it is.
    Conv,
    /// A linear layer `[out, in]` to `[1, 1, in, out]`.
    Linear,
}

/// Initialisation of a parameter: PyTorch's defaults.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// A constant.
    Constant(f32),
    /// Uniform in `[-bound, bound]`.
    Uniform(f64),
    /// Standard normal, for embeddings.
    Normal,
}

impl Init {
    /// The default of convolutions and linear layers, weights and biases: bound `1 / sqrt(fan_in)` (He et al. 2015
    /// with `a = sqrt(5)`).
    pub fn fan_in(fan_in: usize) -> Self {
        Self::Uniform(1.0 / (fan_in as f64).sqrt())
    }

    /// The default of an attention's input projection: bound `sqrt(6 / (fan_in + fan_out))` (Glorot, Bengio 2010).
    pub fn xavier(fan_in: usize, fan_out: usize) -> Self {
        Self::Uniform((6.0 / (fan_in + fan_out) as f64).sqrt())
    }
}

/// State that is kept between steps but not trained: a PyTorch buffer, such as a running mean.
#[derive(Clone, Debug, PartialEq)]
pub struct StateSpec {
    /// The state-dict name.
    pub name: String,
    /// The shape in PyTorch; empty for a scalar.
    pub shape: Vec<usize>,
    /// The initial value of all elements.
    pub value: f32,
}

impl StateSpec {
    /// Number of elements.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// One parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct ParameterSpec {
    /// The state-dict name.
    pub name: String,
    /// The shape in PyTorch.
    pub shape: Vec<usize>,
    /// How the PyTorch layout relates to the engine's.
    pub layout: Layout,
    /// The initialisation.
    pub init: Init,
}

impl ParameterSpec {
    /// The shape in the engine.
    pub fn engine_shape(&self) -> Shape {
        match (self.layout, &self.shape[..]) {
            (Layout::Conv, &[o, i, kh, kw]) => [kh, kw, i, o].into(),
            (Layout::Linear, &[o, i]) => [1, 1, i, o].into(),
            _ => Shape::new(&self.shape),
        }
    }

    /// Number of elements.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Outputs, inputs and taps `kh * kw` of a weight whose layouts differ: `[taps, in, out]` and `[out, in, taps]`.
    fn extents(&self) -> Option<[usize; 3]> {
        match (self.layout, &self.shape[..]) {
            (Layout::Conv, &[o, i, kh, kw]) => Some([o, i, kh * kw]),
            (Layout::Linear, &[o, i]) => Some([o, i, 1]),
            _ => None,
        }
    }

    /// From the engine's layout to PyTorch's.
    pub fn to_torch(&self, engine: &[f32]) -> Vec<f32> {
        let Some([_, i, taps]) = self.extents() else { return engine.to_vec() };
        let o = engine.len() / (i * taps).max(1);
        let mut out = vec![0.0; engine.len()];
        // A cache line of the engine's at a time, to as many rows of PyTorch's.
        out.par_chunks_mut((OUTPUTS * i * taps).max(1)).enumerate().for_each(|(block, rows)| {
            let outputs = rows.len() / (i * taps);
            for (ci, k) in (0..i).flat_map(|ci| (0..taps).map(move |k| (ci, k))) {
                let from = (k * i + ci) * o + block * OUTPUTS;
                for (co, value) in engine[from..][..outputs].iter().enumerate() {
                    rows[(co * i + ci) * taps + k] = *value;
                }
            }
        });
        out
    }

    /// From PyTorch's layout to the engine's.
    pub fn from_torch(&self, torch: &[f32]) -> Vec<f32> {
        let Some([o, i, taps]) = self.extents() else { return torch.to_vec() };
        let mut out = Vec::with_capacity(torch.len());
        for k in 0..taps {
            for ci in 0..i {
                out.extend((0..o).map(|co| torch[(co * i + ci) * taps + k]));
            }
        }
        out
    }

    /// The initial values of the parameter at `index`, in the engine's layout; depends only on the seed and
    /// index.
    pub fn init(&self, seed: u64, index: usize) -> Vec<f32> {
        match self.init {
            Init::Constant(v) => vec![v; self.num_elements()],
            Init::Normal => {
                let mut z = vec![0.0; self.num_elements()];
                Stream::new(seed, Purpose::Init, 0, index as u32).fill_normal(&mut z);
                z
            }
            Init::Uniform(bound) => Stream::new(seed, Purpose::Init, 0, index as u32)
                .uniforms()
                .take(self.num_elements())
                .map(|u| ((2.0 * u - 1.0) * bound) as f32)
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_round_trip() {
        // Also more outputs than one block of them has.
        let cases = [
            (Layout::Plain, vec![5]),
            (Layout::Conv, vec![3, 2, 4, 5]),
            (Layout::Conv, vec![37, 5, 3, 3]),
            (Layout::Linear, vec![4, 3]),
            (Layout::Linear, vec![50, 7]),
        ];
        for (layout, shape) in cases {
            let spec = ParameterSpec { name: String::new(), shape, layout, init: Init::Constant(0.0) };
            let torch: Vec<f32> = (0..spec.num_elements()).map(|i| i as f32).collect();
            let engine = spec.from_torch(&torch);
            assert_eq!(spec.to_torch(&engine), torch);
            assert_eq!(spec.engine_shape().len(), torch.len());
        }
        let spec = ParameterSpec {
            name: String::new(),
            shape: vec![3, 2, 4, 5],
            layout: Layout::Conv,
            init: Init::Constant(0.0),
        };
        let torch: Vec<f32> = (0..120).map(|i| i as f32).collect();
        // [o, i, y, x] = [2, 1, 3, 4] goes to [y, x, i, o].
        assert_eq!(
            spec.from_torch(&torch)[((3 * 5 + 4) * 2 + 1) * 3 + 2],
            torch[((2 * 2 + 1) * 4 + 3) * 5 + 4]
        );
    }
}
