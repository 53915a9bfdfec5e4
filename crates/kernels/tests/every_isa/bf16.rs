//! Conversion to bf16 and back.

use crate::elementwise::lengths;
use crate::{Rng, bits, unwritten};
use ddpm_kernels::{Isa, bf16, elementwise};

#[test]
fn slices_convert_like_their_elements() {
    let mut rng = Rng::new(70);
    let special = [f32::NAN, f32::INFINITY, -0.0, f32::MAX, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 1e-42];
    for n in lengths() {
        let mut x = rng.vec(n);
        for special in special {
            let at = rng.below(n);
            x[at] = special;
        }
        let want: Vec<u16> = x.iter().map(|&x| bf16::round(x)).collect();
        let back: Vec<f32> = want.iter().map(|&x| bf16::widen(x)).collect();
        for isa in Isa::all() {
            let mut rounded = vec![0x7fff; n];
            elementwise::round_to_bf16(isa, &x, &mut rounded);
            assert_eq!(rounded, want, "{n} elements on {isa}");
            let mut wide = unwritten(n);
            elementwise::widen_from_bf16(isa, &rounded, &mut wide);
            assert_eq!(bits(&wide), bits(&back), "{n} elements on {isa}");
        }
    }
}
