from memformer_kernels.cli import main

main()
