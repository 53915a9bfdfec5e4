//! Dropout (Srivastava et al. 2014), scaled to preserve the mean.

use super::{Backward, Operation, operands};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::TensorType;

/// `y = x` times 0 with probability p, else `1 / (1 - p)`. Its gradient is the same operation with the same mask, which is regenerated
/// rather than kept: it is a function of the run's seed and step, of `site` and of the image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability of dropping an element, in [0, 1).
    pub p: f64,
    /// Index of the dropout in its network; dropouts of one network have different indices, and so different masks.
    pub site: u32,
}

impl Dropout {
    pub(crate) fn check(&self) -> Result<(), String> {
        if !(0.0..1.0).contains(&self.p) {
            return Err(format!(
                "dropout probability {} is out of range; use 0 up to, but not including, 1",
                self.p
            ));
        }
        Ok(())
    }
}

impl Operation for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x] = operands(inputs)?;
        self.check()?;
        Ok(vec![x])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        Ok(Some(vec![Some(b.graph.add(&b.name(), *self, &[b.dy])?)]))
    }

    fn in_place(&self) -> Option<usize> {
        Some(0)
    }

    fn recomputable(&self) -> bool {
        true
    }
}
