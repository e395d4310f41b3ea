# flexkd in a container: for the CPU or for CUDA, by the index that torch comes from; not as root, without secrets.
# UNBUILT: no Docker was at hand where this was written, so nobody has built it yet.
#
#   docker build -t flexkd --build-arg TORCH_INDEX=INDEX .     INDEX of the CPU builds, as PyTorch's install page names it
#   docker build -t flexkd:cuda .                              pip's own index, which holds the CUDA build; or INDEX for your driver
#   docker run --rm --user "$(id -u)" --volume "$PWD:/work" flexkd check recipe.yaml
#   docker run --rm --user "$(id -u)" --volume "$PWD:/work" --gpus all --env HF_TOKEN flexkd:cuda distill recipe.yaml
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
COPY recipes recipes
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels --constraint constraints.txt .

FROM python:${PYTHON}-slim
ARG TORCH_INDEX=
ARG EXTRAS=
COPY constraints.txt /tmp/
COPY --from=build /wheels /tmp/wheels
# torch by itself fixes the build; what it depends on comes with flexkd, from the usual index.
RUN python -m pip install --no-cache-dir --no-deps --constraint /tmp/constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch \
    && python -m pip install --no-cache-dir --constraint /tmp/constraints.txt "$(ls /tmp/wheels/*.whl)${EXTRAS:+[$EXTRAS]}" \
    && rm -r /tmp/wheels /tmp/constraints.txt

# Any user may be named by `docker run --user`, so home and cache belong to all.
RUN useradd --create-home --uid 1000 flexkd && mkdir /work /cache && chmod 1777 /work /cache
ENV HOME=/cache XDG_CACHE_HOME=/cache PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE
USER flexkd
WORKDIR /work
ENTRYPOINT ["flexkd"]
CMD ["--help"]
