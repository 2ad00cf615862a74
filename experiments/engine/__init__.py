"""What the commands are made of.

options           how a section of options is declared; config has the sections of a run
datasets batches losses network optimizer schedule processes runtime
each a section of options, beside what uses it
flags help_text command
the options as flags, --help, and a user's mistake in one line
checks            all that can be refused before a run begins
build pretrained run_parts network_inputs
the state, the weights it starts from, the step and the batches
train_loop        the run from its last checkpoint to its end
evaluation step_metrics logs bad_images scoring query_scores zero_shot summary
what a run measures and writes
report report_images report_plots html_page
the page of a run, and what pages are made of
signals resume workdir errors environment dry_run
Ctrl-C and SIGTERM; how a run ends early and resumes, its folder, what ran, what it would take
trained_network embedding_index
a checkpoint put to use: evaluate, embed, search, export
collection search_service search_pictures search_server search_page/
a page to search in: what is searched, followed, shown, answered, and the page itself
many_runs comparison_table record
sweeps and comparisons, and how a measurement is written
finished_runs comparison_page
what runs have left, and a page that compares them
augmentation measuring phases startup jax_settings
views by name; what the benchmarks share; what takes long is told; what is settled before JAX starts
"""
