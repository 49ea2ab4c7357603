# On a CPU:         docker build -t azure-whisper .
# On an AMD GPU:    docker build -t azure-whisper:rocm --target rocm --build-arg CTRANSLATE2_SHA256=... .
ARG BASE_IMAGE=python:3.13-slim
ARG ROCM_IMAGE=rocm/dev-ubuntu-24.04:7.2.1

# ---- cpu ---------------------------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS cpu
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
# A Python image has all that is needed; a bare Debian gets Debian's Python.
RUN python3 -c 'import ensurepip, venv' 2>/dev/null || { \
        apt-get update \
        && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
        && rm -rf /var/lib/apt/lists/*; \
    }
COPY requirements.txt /app/
# /cache is open to all so that any `--user` can fill it.
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/python -m pip install --no-cache-dir -r /app/requirements.txt \
    && find /opt/venv -type d -name tests -prune -exec rm -rf {} + \
    && useradd --uid 10001 --no-create-home --home-dir /cache whisper \
    && install --directory --owner=whisper --mode=0777 /cache
COPY index.html run.py run.sh whisper_server.py /app/
ENV WHISPER_IN_IMAGE=1 WHISPER_HOST=0.0.0.0 WHISPER_PORT=8000 \
    HOME=/cache XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 DO_NOT_TRACK=1 ORT_DISABLE_TELEMETRY=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
VOLUME /cache
USER 10001
EXPOSE 8000
HEALTHCHECK --start-period=20s --timeout=5s CMD ["/opt/venv/bin/python", "-c", "import os, urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:%s/health' % os.environ['WHISPER_PORT'], timeout=4)"]
ENTRYPOINT ["/app/run.sh"]

# ---- CTranslate2 for AMD GPUs. PyPI has none: the release's wheel, or a build from source -----------------------------
FROM ${ROCM_IMAGE} AS ctranslate2-rocm
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /build
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates curl git python3-venv

# Required: the SHA-256 of the release's rocm-python-wheels-Linux.zip, as its page shows it. None is written here
# because we have not seen the file. 4.8.1 is the newest release whose ROCm wheel people report to use.
ARG CTRANSLATE2_VERSION=4.8.1
ARG CTRANSLATE2_SHA256=
# The wheels hold code for gfx1030 1100 1101 1102 1150 1151 1200 1201. A Radeon 780M (gfx1103) runs gfx1102's with
# HSA_OVERRIDE_GFX_VERSION=11.0.2. To have its own: --build-arg HIP_ARCHITECTURES="gfx1102;gfx1103" and, for the
# checksum, the commits to build. That helps only where rocBLAS, too, has kernels for it.
ARG HIP_ARCHITECTURES=
ARG CTRANSLATE2_COMMIT=
ARG ONEDNN_COMMIT=
RUN if [[ -z "${HIP_ARCHITECTURES}" ]]; then \
        : "${CTRANSLATE2_SHA256:?is required: --build-arg CTRANSLATE2_SHA256=...}"; \
        curl -fsSLo wheels.zip \
            "https://github.com/OpenNMT/CTranslate2/releases/download/v${CTRANSLATE2_VERSION}/rocm-python-wheels-Linux.zip"; \
        echo "${CTRANSLATE2_SHA256}  wheels.zip" | sha256sum --check -; \
        python3 -m zipfile -e wheels.zip wheels; \
        tag=$(python3 -c 'import sys; print("cp%d%d" % sys.version_info[:2])'); \
        mkdir /opt/ctranslate2; \
        mv "$(find wheels -name "ctranslate2-*-${tag}-${tag}-*x86_64.whl")" /opt/ctranslate2; \
    fi
# Upstream's recipe (docker/Dockerfile_rocm), less Intel's MKL: these GPUs sit beside AMD processors, which use oneDNN.
RUN if [[ -n "${HIP_ARCHITECTURES}" ]]; then \
        : "${CTRANSLATE2_COMMIT:?is required with HIP_ARCHITECTURES: --build-arg CTRANSLATE2_COMMIT=...}"; \
        : "${ONEDNN_COMMIT:?is required with HIP_ARCHITECTURES: --build-arg ONEDNN_COMMIT=... (upstream uses v3.10.2)}"; \
        apt-get install -y --no-install-recommends build-essential cmake python3-dev rocm-hip-runtime-dev \
            hipblas-common-dev hipblas-dev hipcub-dev hiprand-dev rocprim-dev rocrand-dev rocthrust-dev; \
        fetch() { git init -q "$1" && git -C "$1" fetch -q --depth 1 "$2" "$3" && git -C "$1" checkout -q FETCH_HEAD; }; \
        fetch oneDNN https://github.com/uxlfoundation/oneDNN "${ONEDNN_COMMIT}"; \
        cmake -S oneDNN -B oneDNN/build -DCMAKE_BUILD_TYPE=Release -DONEDNN_LIBRARY_TYPE=STATIC \
            -DONEDNN_BUILD_EXAMPLES=OFF -DONEDNN_BUILD_TESTS=OFF -DONEDNN_BUILD_GRAPH=OFF \
            -DONEDNN_ENABLE_WORKLOAD=INFERENCE -DONEDNN_ENABLE_PRIMITIVE="CONVOLUTION;REORDER"; \
        cmake --build oneDNN/build --parallel --target install; \
        fetch CTranslate2 https://github.com/OpenNMT/CTranslate2 "${CTRANSLATE2_COMMIT}"; \
        git -C CTranslate2 submodule update --init --recursive --depth 1; \
        cmake -S CTranslate2 -B CTranslate2/build -DCMAKE_BUILD_TYPE=Release \
            -DCMAKE_INSTALL_PREFIX=/opt/ctranslate2 -DCMAKE_INSTALL_LIBDIR=lib \
            -DCMAKE_C_COMPILER=amdclang -DCMAKE_CXX_COMPILER=amdclang++ \
            -DWITH_HIP=ON -DWITH_MKL=OFF -DWITH_DNNL=ON -DOPENMP_RUNTIME=COMP -DBUILD_CLI=OFF \
            -DCMAKE_HIP_ARCHITECTURES="${HIP_ARCHITECTURES}" -DGPU_TARGETS="${HIP_ARCHITECTURES}" \
            -DCMAKE_CXX_FLAGS="-msse4.1 -O3 -Wno-deprecated-literal-operator" \
            -DCMAKE_HIP_FLAGS="-O3 -Wno-deprecated-literal-operator"; \
        cmake --build CTranslate2/build --parallel --target install; \
        python3 -m venv venv; \
        cd CTranslate2/python; \
        /build/venv/bin/python -m pip install -r install_requirements.txt; \
        CTRANSLATE2_ROOT=/opt/ctranslate2 /build/venv/bin/python setup.py bdist_wheel --dist-dir /opt/ctranslate2; \
    fi

# ---- rocm: not run on hardware by us -----------------------------------------------------------------------------------
FROM ${ROCM_IMAGE} AS rocm
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates hipblas hiprand python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY --from=ctranslate2-rocm /opt/ctranslate2 /opt/ctranslate2
COPY requirements.txt /app/
# The AMD wheel has the name and the version of PyPI's, so it goes in last and is not resolved.
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/python -m pip install --no-cache-dir -r /app/requirements.txt \
    && /opt/venv/bin/python -m pip install --no-cache-dir --no-deps --force-reinstall /opt/ctranslate2/*.whl \
    && rm /opt/ctranslate2/*.whl \
    && printf '%s\n' /opt/ctranslate2/lib /opt/rocm/lib /opt/rocm/lib/llvm/lib > /etc/ld.so.conf.d/whisper.conf \
    && ldconfig \
    && useradd --uid 10001 --no-create-home --home-dir /cache whisper \
    && install --directory --owner=whisper --mode=0777 /cache
COPY index.html run.py run.sh whisper_server.py /app/
ENV WHISPER_IN_IMAGE=1 WHISPER_HOST=0.0.0.0 WHISPER_PORT=8000 \
    HOME=/cache XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 DO_NOT_TRACK=1 ORT_DISABLE_TELEMETRY=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
VOLUME /cache
USER 10001
EXPOSE 8000
HEALTHCHECK --start-period=20s --timeout=5s CMD ["/opt/venv/bin/python", "-c", "import os, urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:%s/health' % os.environ['WHISPER_PORT'], timeout=4)"]
ENTRYPOINT ["/app/run.sh"]

# ---- the default: last, so that a plain `docker build .` makes it ------------------------------------------------------
FROM cpu
