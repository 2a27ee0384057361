"""Iterative denoising on the host: loop, acceptance, sampling, statistics. numpy only; knows no backend."""
