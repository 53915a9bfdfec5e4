//! cuDNN and cuBLASLt through the driver code (`driver.rs`, `ffi/libraries.rs`), with a stand-in for both that checks its
//! arguments (`emulator/libraries.h`).

use crate::stand_in::in_own_process;
use crate::table::{self, Form, agree};
use crate::{Small, assert_mentions, make, training};
use ddpm_engine::{ComputeOptions, Device, Executor, MatmulDtype, Result};
use ddpm_engine_cuda::library::Libraries;
use ddpm_engine_cuda::lower::CudaOptions;
use ddpm_engine_cuda::{CudaDevice, probe};

/// The driver, NVRTC and the two libraries.
const WITH_LIBRARIES: &[&str] =
    &["libcuda.so", "libcuda.so.1", "libnvrtc.so", "libnvrtc.so.12", "libcudnn.so", "libcublasLt.so"];

fn forced(number: usize) -> CudaOptions {
    CudaOptions { libraries: Libraries::Forced(number), workspace: 1024, ..CudaOptions::default() }
}

#[test]
fn libraries_agree_with_the_cpu() {
    let test = "libraries::libraries_agree_with_the_cpu";
    let report = in_own_process(test, "all", WITH_LIBRARIES, &[], || {
        let cases = table::convolutions(Form::Plain);
        // `libraries/mod.rs` runs all cases.
        for case in cases.iter().step_by(2) {
            agree(case, ComputeOptions::default(), 1e-5, &make(forced(0)));
        }
        let tf32 = CudaOptions { tf32: true, ..forced(1) };
        for case in cases.iter().take(5) {
            agree(case, ComputeOptions::default(), 1e-5, &make(tf32));
        }
        let bf16 = ComputeOptions { matmul_dtype: MatmulDtype::Bf16, ..ComputeOptions::default() };
        for (i, case) in table::convolutions(Form::Stored).iter().step_by(3).enumerate() {
            let cuda_options = CudaOptions { min_bf16_elems: 1, ..forced(i % 2) };
            agree(case, bf16, table::BF16_TOLERANCE, &make(cuda_options));
        }
        training::fused_steps(&make(forced(0)));
    });
    let Some(report) = report else { return };
    report.assert_all_released();
    for what in [
        "forward_convolutions",
        "data_gradients",
        "weight_gradients",
        "convolutions_with_a_bias",
        "convolutions_in_f32",
        "matrix_products",
        "matrix_products_with_a_bias",
        "matrix_products_in_tf32",
    ] {
        assert!(report.count(what) > 0, "{what}");
    }
}

#[test]
fn the_fastest_candidate_is_chosen_and_failing_ones_are_not() {
    let test = "libraries::the_fastest_candidate_is_chosen_and_failing_ones_are_not";
    let with = |libraries| -> Result<Box<dyn Executor>> {
        let small = Small::new();
        let cuda_options = CudaOptions { libraries, workspace: 1024, ..CudaOptions::default() };
        CudaDevice { index: 0, options: cuda_options }.executor(small.graph.clone(), &small.options())
    };
    let agrees = |mut exec: Box<dyn Executor>| {
        Small::new().agree(&mut *exec, 1);
        exec.describe()
    };
    // The stand-in's operations are faster than emulated kernels.
    type Scenario<'a> = (&'a str, &'a [&'a str], &'a [(&'a str, &'a str)], bool);
    let without = &WITH_LIBRARIES[..4];
    let scenarios: [Scenario<'_>; 4] = [
        ("libraries", WITH_LIBRARIES, &[], true),
        ("libraries that fail", WITH_LIBRARIES, &[("FAIL", "product:1:1 product:2:1")], false),
        ("libraries that are too old", WITH_LIBRARIES, &[("CUDNN", "8907"), ("CUBLAS", "110000")], false),
        ("no libraries", without, &[], false),
    ];
    for (scenario, names, settings, chosen) in scenarios {
        let report = in_own_process(test, scenario, names, settings, || {
            // The second executor has its own library handles, but reuses the first one's decision.
            for _ in 0..2 {
                let exec = with(Libraries::Timed).expect("an executor");
                let description = agrees(exec);
                assert_eq!(
                    description.contains("0 convolutions by cuDNN, 2 matrix products by cuBLASLt"),
                    chosen,
                    "{scenario}: {description}"
                );
            }
            for library in probe::libraries().iter().skip(2) {
                let description = format!("{:?}", library.version);
                match scenario {
                    "libraries that are too old" => {
                        assert!(description.contains("too old") && description.contains("built-in kernels"))
                    }
                    "no libraries" if library.version.is_err() => {
                        assert!(description.contains("cannot find"))
                    }
                    "no libraries" => println!("skipped: the machine has {library:?}"),
                    _ => {
                        assert!(["9.21.0", "13.0.0"].iter().any(|v| description.contains(v)), "{description}")
                    }
                }
            }
        });
        if let Some(report) = report {
            report.assert_all_released();
        }
    }
    // If the library was forced, its error is reported.
    let settings = [("FAIL", "product:1:1")];
    let report = in_own_process(test, "a forced library fails", WITH_LIBRARIES, &settings, || {
        let error = with(Libraries::Forced(0)).err().expect("the operation fails");
        assert_mentions(&error, &["cuda:0", "cuBLASLt: matmul: CUBLAS_STATUS_NOT_SUPPORTED"]);
    });
    if let Some(report) = report {
        report.assert_all_released();
    }
}
