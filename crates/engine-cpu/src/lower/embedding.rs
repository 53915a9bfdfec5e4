//! Embedding lookup: the rows of a table selected by class labels.

use super::Lowering;
use crate::kernel::{Kernel, KernelArgs};

impl Lowering<'_> {
    pub(super) fn embedding(&self) -> Kernel {
        let c = self.inputs[0].shape.channels();
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            for (y, &label) in args.outputs[0].chunks_exact_mut(c).zip(args.inputs[1]) {
                match row(label).and_then(|i| args.inputs[0].chunks_exact(c).nth(i)) {
                    Some(row) => y.copy_from_slice(row),
                    None => y.fill(0.0),
                }
            }
        })
    }

    pub(super) fn embedding_grad(&self) -> Kernel {
        let (isa, c) = (self.isa, self.inputs[0].shape.channels());
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let dtable = &mut *args.outputs[0];
            dtable.fill(0.0);
            for (dy, &label) in args.inputs[0].chunks_exact(c).zip(args.inputs[1]) {
                if let Some(row) = row(label).and_then(|i| dtable.chunks_exact_mut(c).nth(i)) {
                    ddpm_kernels::elementwise::add_assign(isa, dy, row);
                }
            }
        })
    }
}

/// The row of a label.
fn row(label: f32) -> Option<usize> {
    (label >= 0.0 && label.fract() == 0.0).then_some(label as usize)
}
