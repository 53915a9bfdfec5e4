//! A naive version of every kernel: the oracle of the tests. Loops that follow the formulas, in f64, never
//! optimised.
//!
//! Layouts are those of the kernels. Everything takes and returns f64, so that finite differences of these
//! functions are accurate enough to check gradients. Most results are sums of products; the same function
//! applied to absolute values gives the sum of the products' absolute values, which is the scale of a
//! kernel's rounding error.
//!
//! | sizes | meaning |
//! |---|---|
//! | `n, h, w` / `oh, ow` | images, input height and width / output height and width |
//! | `cin, cout` / `c` | input, output channels / channels |
//! | `kh, kw` | kernel height and width |

mod attention;
mod bound;
mod conv;
mod elementwise;
mod loss;
mod norm;
mod optimizer;
mod resample;

pub use attention::{AttentionShape, Factor, attention, attention_backward};
pub use bound::bound_sum;
pub use conv::{conv2d, conv2d_data_grad, conv2d_weight_grad};
pub use elementwise::{
    activate, activation_derivative, add_rows, combine, normal_cdf, sigmoid, silu, silu_derivative, sum_rows,
};
pub use loss::{loss_grad, loss_mean, loss_sum};
pub use norm::{batch_norm, group_norm, group_norm_backward, layer_norm};
pub use optimizer::{Trained, adam};
pub use resample::{max_pool, resample};

/// Rows and columns in row-major order.
fn grid(height: usize, width: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..height).flat_map(move |y| (0..width).map(move |x| (y, x)))
}
