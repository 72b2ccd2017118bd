"""The kernels inside other packages' models; each module here needs the package that it is named after."""
