//! cuDNN and cuBLASLt through the driver's part (`driver.rs`, `ffi/libraries.rs`), with a stand-in for both that checks what it
//! is given (`emulator/libraries.h`).

use crate::stand_in::apart;
use crate::table::{self, Form, agree};
use crate::{Small, make, says, training};
use ddpm_engine::{ComputeOptions, Device, Executor, MatmulDtype, Result};
use ddpm_engine_cuda::library::Libraries;
use ddpm_engine_cuda::translate::Choices;
use ddpm_engine_cuda::{CudaDevice, probe};

/// The driver, NVRTC and the two libraries.
const WITH_LIBRARIES: &[&str] =
    &["libcuda.so", "libcuda.so.1", "libnvrtc.so", "libnvrtc.so.12", "libcudnn.so", "libcublasLt.so"];

fn forced(number: usize) -> Choices {
    Choices { libraries: Libraries::Forced(number), workspace: 1024, ..Choices::default() }
}

#[test]
fn products_agree_with_the_cpu() {
    let test = "libraries::products_agree_with_the_cpu";
    let report = apart(test, "all", WITH_LIBRARIES, &[], || {
        let cases = table::convolutions(Form::Plain);
        // The emulated GPU's libraries make all of them (`libraries/mod.rs`).
        for case in cases.iter().step_by(2) {
            agree(case, ComputeOptions::default(), 1e-5, &make(forced(0)));
        }
        let tf32 = Choices { tf32: true, ..forced(1) };
        for case in cases.iter().take(5) {
            agree(case, ComputeOptions::default(), 1e-5, &make(tf32));
        }
        let bf16 = ComputeOptions { factors: MatmulDtype::Bf16, ..ComputeOptions::default() };
        for (i, case) in table::convolutions(Form::Stored).iter().step_by(3).enumerate() {
            let choices = Choices { least_bf16: 1, ..forced(i % 2) };
            agree(case, bf16, table::STORED, &make(choices));
        }
        training::in_runs(&make(forced(0)));
    });
    let Some(report) = report else { return };
    report.nothing_left();
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
        assert!(report.of(what) > 0, "{what}");
    }
}

#[test]
fn what_is_faster_is_taken_and_what_fails_is_not() {
    let test = "libraries::what_is_faster_is_taken_and_what_fails_is_not";
    let with = |libraries| -> Result<Box<dyn Executor>> {
        let small = Small::new();
        let choices = Choices { libraries, workspace: 1024, ..Choices::default() };
        CudaDevice { index: 0, choices }.executor(small.graph.clone(), &small.options())
    };
    let agrees = |mut exec: Box<dyn Executor>| {
        Small::new().agree(&mut *exec, 1);
        exec.describe()
    };
    // The stand-in's products are faster than emulated kernels.
    type Scenario<'a> = (&'a str, &'a [&'a str], &'a [(&'a str, &'a str)], bool);
    let without = &WITH_LIBRARIES[..4];
    let scenarios: [Scenario<'_>; 4] = [
        ("libraries", WITH_LIBRARIES, &[], true),
        ("libraries that fail", WITH_LIBRARIES, &[("FAIL", "product:1:1 product:2:1")], false),
        ("libraries that are too old", WITH_LIBRARIES, &[("CUDNN", "8907"), ("CUBLAS", "110000")], false),
        ("no libraries", without, &[], false),
    ];
    for (scenario, names, settings, taken) in scenarios {
        let report = apart(test, scenario, names, settings, || {
            // The second has libraries of its own, and the first one's choice.
            for _ in 0..2 {
                let exec = with(Libraries::Timed).expect("an executor");
                let told = agrees(exec);
                assert_eq!(told.contains("0 products by cuDNN, 2 by cuBLASLt"), taken, "{scenario}: {told}");
            }
            for library in probe::libraries().iter().skip(2) {
                let told = format!("{:?}", library.version);
                match scenario {
                    "libraries that are too old" => {
                        assert!(told.contains("too old") && told.contains("own kernels"))
                    }
                    "no libraries" if library.version.is_err() => assert!(told.contains("cannot be found")),
                    "no libraries" => println!("skipped: the machine has {library:?}"),
                    _ => assert!(["9.21.0", "13.0.0"].iter().any(|v| told.contains(v)), "{told}"),
                }
            }
        });
        if let Some(report) = report {
            report.nothing_left();
        }
    }
    // Where one was to make it, its own words are told.
    let settings = [("FAIL", "product:1:1")];
    let report = apart(test, "a failure that matters", WITH_LIBRARIES, &settings, || {
        let error = with(Libraries::Forced(0)).err().expect("a product fails");
        says(&error, &["cuda:0", "cuBLASLt: a product: CUBLAS_STATUS_NOT_SUPPORTED"]);
    });
    if let Some(report) = report {
        report.nothing_left();
    }
}
