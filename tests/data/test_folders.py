from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from rll_jax.data import folders, image_dataset, listings, paths
from tests.helpers.benchmark_trees import make_folders


def test_a_folder_for_each_class(tmp_path):
    make_folders(tmp_path, [f"class {c}" for c in range(10)])
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "class 3/more").mkdir()
    (tmp_path / "class 3/more/x.webp").write_bytes(b"")
    rows = folders.class_folders(tmp_path, test_share=0.3, seed=4)
    assert len(rows) == 31 and {row.path.split("/")[0] for row in rows} == {
        f"class {c}" for c in range(10)
    }
    assert all(row.label == int(row.path.split("/")[0][-1]) for row in rows)
    tested = {row.label for row in rows if row.split == "test"}
    assert len(tested) == 3 and tested.isdisjoint(row.label for row in rows if row.split == "train")
    assert (
        folders.class_folders(tmp_path, 0.3, 4) == rows != folders.class_folders(tmp_path, 0.3, 5)
    )


def test_train_and_test_folders(tmp_path):
    make_folders(tmp_path / "train", ["a", "b"])
    make_folders(tmp_path / "test", ["c", "d"])
    rows = folders.class_folders(tmp_path)
    assert {(row.path.rsplit("/", 1)[0], row.split) for row in rows} == {
        ("train/a", "train"),
        ("train/b", "train"),
        ("test/c", "test"),
        ("test/d", "test"),
    }
    assert len({row.label for row in rows}) == 4
    make_folders(tmp_path / "test", ["a"])
    with pytest.raises(ValueError, match=r"1 classes are in train/ and in test/, such as \['a'\]"):
        folders.class_folders(tmp_path)


def test_folders_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        folders.class_folders(tmp_path / "nowhere")
    make_folders(tmp_path, ["alone"])
    with pytest.raises(
        ValueError, match="expected a folder of images for each class .* found 1 with images"
    ):
        folders.class_folders(tmp_path)


def test_the_second_half_of_the_classes(tmp_path):
    make_folders(tmp_path, ["b", "c", "A", "e", "d"])
    rows = folders.class_folders(tmp_path, test_classes="second_half")
    assert {(row.path[0], row.split) for row in rows} == {
        ("A", "train"), ("b", "train"), ("c", "test"), ("d", "test"), ("e", "test")
    }  # fmt: skip
    assert rows == folders.class_folders(tmp_path, 0.1, 7, test_classes="second_half")
    with pytest.raises(
        ValueError, match="test_classes='first': expected one of drawn, second_half"
    ):
        folders.class_folders(tmp_path, test_classes="first")
    table = "path,label\n" + "".join(f"{label}.jpg,{label}\n" for label in (10, 9, 2, 1))
    rows = folders.read_index(index(tmp_path, table), test_classes="second_half")
    assert [row.split for row in rows] == ["test", "test", "train", "train"]
    table = index(tmp_path, "path,label,split\na,1,train\nb,2,test\n")
    with pytest.raises(ValueError, match="index.csv: has a split for each row, so test_classes"):
        folders.read_index(table, test_classes="second_half")
    make_folders(tmp_path / "split" / "train", ["a", "b"])
    make_folders(tmp_path / "split" / "test", ["c", "d"])
    with pytest.raises(ValueError, match="has train/ and test/, so test_classes=second_half"):
        folders.class_folders(tmp_path / "split", test_classes="second_half")


@pytest.mark.parametrize(
    "names",
    [
        ["train", "val", "valid"],
        ["train", "test", "query"],
        ["train", "query"],
        ["train", "test", "class"],
        ["Val", "class"],
        ["train", "training", "test"],
        ["train"],
    ],
)
def test_splits_by_other_names_are_not_classes(names, tmp_path):
    make_folders(tmp_path, [f"{name}/{name}_{c}" for name in names for c in range(2)])
    with pytest.raises(
        ValueError, match="expected train and test with the classes in them, or the classes alone"
    ):
        folders.class_folders(tmp_path)


SPLIT_FOLDERS = {
    "val": {"train": "train", "val": "test"},
    "VALID": {"Train": "train", "VALID": "test"},
    "validation": {"training": "train", "validation": "test"},
    "val and test": {"train": "train", "test": "test", "val": ""},
    "val alone": {"val": "test"},
    "query": {"train": "train", "query": "query", "gallery": "gallery"},
    "query alone": {"query": "query", "gallery": "gallery"},
}


@pytest.mark.parametrize("kind", SPLIT_FOLDERS)
def test_folders_of_splits_as_people_call_them(kind, tmp_path):
    expected = SPLIT_FOLDERS[kind]
    for name, split in expected.items():
        first = {"train": 0, "test": 2, "query": 2, "gallery": 2}.get(split, 4)
        make_folders(tmp_path / name, [f"class {c}" for c in (first, first + 1)])
    left_out = []
    rows = folders.class_folders(tmp_path, on_left_out=left_out.append)
    assert {(row.path.split("/")[0], row.split) for row in rows} == {
        (name, split) for name, split in expected.items() if split
    }
    classes = {row.path.split("/")[1]: row.label for row in rows}
    assert sorted(classes.values()) == list(range(len(classes)))
    assert all(row.label == classes[row.path.split("/")[1]] for row in rows)
    left = left_out[0]["images of val/, as test/ is searched"]
    assert left == (6 if "" in expected.values() else 0)


@pytest.mark.parametrize("names", [("train", "val"), ("train", "query", "gallery")])
def test_the_same_classes_in_train_and_val_are_refused(names, tmp_path):
    for name in names:
        make_folders(tmp_path / name, ["a", "b"])
    text = rf"2 classes are in train/ and in .*{names[-1] if 'val' in names else 'query'}/, such as"
    with pytest.raises(ValueError, match=rf"{text} \['a', 'b'\].*/train alone is split by class"):
        folders.class_folders(tmp_path)


def test_prepared_files_beside_folders_of_splits(tmp_path):
    for name in ("train", "val"):
        make_folders(tmp_path / name, [f"{name} a", f"{name} b"])
    rows = folders.class_folders(tmp_path)
    (tmp_path / "prepared_folder").mkdir()
    (tmp_path / "prepared_folder/dataset_info.json").write_text("{}")
    assert folders.class_folders(tmp_path) == rows


def test_classes_may_be_called_as_splits_that_people_rarely_make(tmp_path):
    make_folders(tmp_path, ["dev", "query", "cat"])
    assert len({row.label for row in folders.class_folders(tmp_path)}) == 3


def test_labels_that_read_alike_are_numbered_alike(tmp_path):
    rows = "".join(f"{i}.jpg,{label},train\n" for i, label in enumerate(["01", "1", "001", "2"]))
    text = f"path,label,split\n{rows}x.jpg,9,test\ny.jpg,9,test\n"
    assert [row.label for row in folders.read_index(index(tmp_path, text))] == [1, 2, 0, 3, 4, 4]


def index(tmp_path, text, name="index.csv"):
    (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return tmp_path / name


def test_a_table(tmp_path):
    text = (
        '\ufeffpath,note,label,split\r\n\r\n"b, c.jpg",x,10,train\r\n'
        "d.jpg,,9,query\r\ne.jpg,,9,gallery\r\n"
    )
    assert folders.read_index(index(tmp_path, text)) == [
        listings.Row("b, c.jpg", 1, "train"),
        listings.Row("d.jpg", 0, "query"),
        listings.Row("e.jpg", 0, "gallery"),
    ]


def test_a_table_without_a_split(tmp_path):
    text = "label,path,super_label\n" + "".join(
        f"c{c},{c}_{i}.png,{c % 2}\n" for c in range(10) for i in range(2)
    )
    rows = folders.read_index(index(tmp_path, text), test_share=0.5, seed=1)
    assert [row.label for row in rows] == np.repeat(range(10), 2).tolist()
    assert [row.super_label for row in rows] == (np.repeat(range(10), 2) % 2).tolist()
    assert {row.label for row in rows if row.split == "test"}.isdisjoint(
        row.label for row in rows if row.split == "train"
    )


def test_a_parquet_table_is_the_same(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    columns = {
        "path": ["a.jpg", "b.jpg", "c.jpg"],
        "label": [7, 10, 7],
        "split": ["train", "test", "train"],
    }
    parquet.write_table(pa.table(columns), tmp_path / "index.parquet")
    lines = "\n".join(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))
    assert folders.read_index(tmp_path / "index.parquet") == folders.read_index(
        index(tmp_path, f"path,label,split\n{lines}")
    )
    columns["path"][1] = "../b.jpg"
    parquet.write_table(pa.table(columns), tmp_path / "index.parquet")
    with pytest.raises(ValueError, match="index.parquet, row 1: the path is"):
        folders.read_index(tmp_path / "index.parquet")
    for cells in ([float("nan"), 1.0], [b"a", b"b"]):
        parquet.write_table(
            pa.table({"path": ["a.jpg", "b.jpg"], "label": cells}), tmp_path / "index.parquet"
        )
        with pytest.raises(ValueError, match="row 0: expected text or a whole number"):
            folders.read_index(tmp_path / "index.parquet")
    whole = (tmp_path / "index.parquet").read_bytes()
    for damaged in (whole[:-9], b"", whole[:40] + bytes(40) + whole[80:]):
        with pytest.raises(ValueError, match="index.parquet"):
            folders.read_index(index(tmp_path, damaged, "index.parquet"))


@pytest.mark.parametrize(
    "text, error",
    [
        ("", "line 1: expected a header with the columns path and label"),
        (
            "path;label\na;b",
            "line 1: expected a header .*, with commas between, found 'path;label'",
        ),
        ("\ufeffpath\tlabel\na\tb", "line 1: expected a header .*, with commas between"),
        ("path,label\n", "lists no image"),
        ("path,label\na.jpg", "line 2: expected 2 fields, found 1"),
        ("path,label\na.jpg,", "line 2: expected a label, found none"),
        ("path,label\na.jpg,1\n,1", "line 3: the path is '', expected one inside"),
        ("path,label\na.jpg,1\nNaN,1", "line 3: the path is 'NaN', expected one inside"),
        ("path,label\n/etc/passwd,1", "line 2: the path is '/etc/passwd', expected one inside"),
        ("path,label\na/../../x,1", "line 2: the path is "),
        ("path,label\na,1\n\na,1", "line 4: a was listed in line 2 already"),
        (
            "path,label,split\na,1,holdout",
            "line 2: the split is 'holdout', expected one of train, test, query, gallery",
        ),
        ("path,label,split\na,1,train\nb,1,", "line 3: some rows have a split and some have none"),
        ("path,label\na,1", "expected at least two classes"),
        ("path,label\na,1\n./a,1", "line 3: a was listed in line 2 already"),
        ("path,label,split\na,x,train\nb,x,test", "1 classes are in train and in test, such as x"),
        (
            "path,label,split\na,x,train\nb,y,test\nc,y,gallery",
            "has splits test and query or gallery",
        ),
        ('path,label\n"a,1\nb",2', "line 2: not a table with commas"),
        ('path,label\na,1\nb,"2"x', "line 3: not a table with commas"),
        (b"path,label\n\xff,1", "line 2: not UTF-8"),
    ],
)
def test_tables_that_cannot_be(text, error, tmp_path):
    with pytest.raises(ValueError, match=f"index.csv.*({error})"):
        folders.read_index(index(tmp_path, text))


def test_other_files_are_no_tables(tmp_path):
    with pytest.raises(ValueError, match="index.xls: expected a .csv or a .parquet"):
        folders.read_index(tmp_path / "index.xls")
    with pytest.raises(ValueError, match="index.csv: no such file"):
        folders.read_index(tmp_path / "index.csv")


@pytest.mark.parametrize(
    "label",
    ["", '""', "nan", "NaN", "None", "NA", "N/A", "null", "NULL", "<NA>", "  ", '" "', "none"],
)
def test_empty_labels_are_refused_by_row(label, tmp_path):
    text = f"path,label\na.jpg,Nanette\nb.jpg,{label}\n"
    with pytest.raises(ValueError, match="index.csv, line 3: expected .* label, found"):
        folders.read_index(index(tmp_path, text))
    pa, parquet = pyarrow()
    parquet.write_table(
        pa.table({"path": ["a.jpg", "b.jpg"], "label": ["Nanette", label.strip('"')]}),
        tmp_path / "index.parquet",
    )
    with pytest.raises(ValueError, match="index.parquet, row 1: expected .* label, found"):
        folders.read_index(tmp_path / "index.parquet")


def pyarrow():
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    return pa, parquet


LABELS = {
    "integers": ([2, 10, 2, -3], None, ["2", "10", "2", "-3"]),
    "floats": ([10.0, 9.0, 2.0, 10.0], None, ["10.0", "9.0", "2.0", "10.0"]),
    "parts": ([1.5, 0.1, 1.0, 1.5], "float32", ["1.5", "0.1", "1.0", "1.5"]),
    "large": ([1e16, 1e15, 1e16, 2.0], None, ["1e+16", "1000000000000000.0", "1e+16", "2.0"]),
    "zeros": (["007", "07", "7", "7.0"], None, ["007", "07", "7", "7.0"]),
    "mixed": (["10", "10.0", "9", "9.00"], None, ["10", "10.0", "9", "9.00"]),
    "truth": ([True, False, True, False], None, ["true", "False", "TRUE", "false"]),
    "spaces": (["a ", " a", "b", "c"], None, ["a", " a", '"b"', ' "c"']),
    "names": (["x,y", "é", "Nan Goldin", "nano"], None, ['"x,y"', "é", "Nan Goldin", "nano"]),
    "categories": (["b", "a", "b", "c"], "dictionary", ["b", "a", "b", "c"]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_a_table_has_the_same_classes_in_both_kinds(kind, tmp_path):
    pa, parquet = pyarrow()
    cells, stored_as, texts = LABELS[kind]
    column = pa.array(cells, type=pa.float32()) if stored_as == "float32" else pa.array(cells)
    column = column.dictionary_encode() if stored_as == "dictionary" else column
    names = [f"{i}.jpg" for i in range(len(cells))]
    parquet.write_table(pa.table({"path": names, " label": column}), tmp_path / "index.parquet")
    lines = "".join(f"{name},{text}\r\n" for name, text in zip(names, texts, strict=True))
    found = folders.read_index(index(tmp_path, f"path , label\r\n{lines}"))
    assert found == folders.read_index(tmp_path / "index.parquet")
    alike = {"floats": [1, 0], "zeros": [0, 1, 2, 2], "mixed": [1, 1, 0, 0], "truth": [1, 0, 1, 0]}
    labels = [row.label for row in found]
    expected = {**alike, "floats": [2, 1, 0, 2], "spaces": [0, 0, 1, 2]}.get(kind, labels)
    assert labels == expected


@pytest.mark.parametrize("word", ["val", "valid", "VALIDATION", "Dev", "Test", "testing", " test "])
def test_words_for_the_searched_split(word, tmp_path):
    text = f"path,label,split\na,1,Train\nb,1,TRAINING\nc,2,{word}\nd,2,{word}\n"
    rows = folders.read_index(index(tmp_path, text))
    assert [row.split for row in rows] == ["train", "train", "test", "test"]
    assert len(folders.read_index(index(tmp_path, text.replace(word, "NaN").replace("Train", "")
                                        .replace("TRAINING", "None")))) == 4  # fmt: skip


FRAME = """,path,label,split,is_query,is_gallery,category,sequence
0,a.jpg,5,train,,,x,
1,b.jpg,5,train,,,x,
2,c.jpg,7,validation,{},y,1
3,d.jpg,7,validation,{},y,1
"""


@pytest.mark.parametrize(
    "roles, expected",
    [
        (("True,False", "False,True"), ["query", "gallery"]),
        (("1.0,0.0", "0.0,1.0"), ["query", "gallery"]),
        (("True,True", "1,1"), ["test", "test"]),
        (("True,True", "1,0"), ["test", "query"]),
        (("False,True", "True,True"), ["gallery", "test"]),
        ((",", "nan,None"), ["test", "test"]),
    ],
)
def test_data_frames_of_open_metric_learning(roles, expected, tmp_path):
    rows = folders.read_index(index(tmp_path, FRAME.format(*roles)))
    assert [row.split for row in rows] == ["train", "train", *expected]
    test = image_dataset.from_rows(tmp_path, rows)["test"]
    assert (test.in_gallery is None) == (set(expected) == {"test"})
    assert (test.is_query is None) == (set(expected) == {"test"} or "test" not in expected)
    assert test.query_rows.tolist() == [i for i in (0, 1) if expected[i] != "gallery"]
    assert test.gallery_rows.tolist() == [i for i in (0, 1) if expected[i] != "query"]


@pytest.mark.parametrize(
    "old, new, error",
    [
        (
            "True,True,y,1\n3",
            "False,False,y,1\n3",
            "line 4: is_query and is_gallery are both false",
        ),
        (
            "True,True,y,1\n3,d.jpg,7,validation,True,True",
            "True,False,y,1\n3,d.jpg,7,validation,,",
            "line 5 is searched and found, line 4 is query",
        ),
        ("True,True,y,1\n3", "maybe,True,y,1\n3", "line 4: is_query is 'maybe', expected True"),
        ("train,,,x,\n1", "train,True,,x,\n1", "line 2: is_query or is_gallery is true"),
        (
            "validation,True,True,y,1\n3",
            "test,True,True,y,1\n3",
            r"test \(line 4\) and val \(line 5",
        ),
        ("category", "x_1", r"line 2: has a bounding box \(x_1\), and images are read whole"),
    ],
)
def test_data_frames_that_cannot_be(old, new, error, tmp_path):
    text = FRAME.format("True,True", "True,True").replace(old, new, 1)
    with pytest.raises(ValueError, match=f"index.csv.*{error}"):
        folders.read_index(index(tmp_path, text))


def test_categories_of_open_metric_learning_are_super_classes(tmp_path):
    rows = folders.read_index(index(tmp_path, FRAME.format("1,1", "1,1")))
    assert [row.super_label for row in rows] == [0, 0, 1, 1]
    plain = "path,label,category\na,1,x\nb,2,y\n"  # of a table of one's own it is ignored
    assert {row.super_label for row in folders.read_index(index(tmp_path, plain))} == {0}


def test_sequences_of_open_metric_learning_are_groups(tmp_path):
    rows = folders.read_index(index(tmp_path, FRAME.format("True,False", "False,True")))
    assert [row.group for row in rows] == ["", "", "1", "1"]
    plain = "path,label,sequence\na,1,x\nb,2,y\n"  # of a table of one's own it is ignored
    assert {row.group for row in folders.read_index(index(tmp_path, plain))} == {""}


def test_endings_of_tables_in_capitals(tmp_path):
    pa, parquet = pyarrow()
    text = index(tmp_path, "path,label\na,1\nb,2\n", "INDEX.CSV")
    parquet.write_table(pa.table({"path": ["a", "b"], "label": [1, 2]}), tmp_path / "I.PARQUET")
    assert folders.read_index(text) == folders.read_index(tmp_path / "I.PARQUET")


def test_columns_that_are_there_twice(tmp_path):
    pa, parquet = pyarrow()
    table = pa.Table.from_arrays([pa.array(["a", "b"])] * 3, names=["path", "label", "label "])
    parquet.write_table(table, tmp_path / "index.parquet")
    with pytest.raises(ValueError, match="columns path and label, each once, found path, label"):
        folders.read_index(tmp_path / "index.parquet")
    with pytest.raises(ValueError, match="line 1: expected a header with the columns path and"):
        folders.read_index(index(tmp_path, "path,label, label\na,1,1\n"))
    assert len(folders.read_index(index(tmp_path, "path,label,,\na,1,,\nb,2,,\n"))) == 2


def test_one_of_the_two_columns_tells_the_other(tmp_path):
    text = "path,label,split,{}\na,1,train,{}\nb,2,validation,True\nc,2,validation,0\n"
    for column, expected in (("is_query", "query"), ("is_gallery", "gallery")):
        other = {"query": "gallery", "gallery": "query"}[expected]
        for train in ("", "False"):
            rows = folders.read_index(index(tmp_path, text.format(column, train)))
            assert [row.split for row in rows] == ["train", expected, other]


def test_names_of_columns_in_capitals(tmp_path):
    pa, parquet = pyarrow()
    for names in (["Path", "LABEL ", "Split"], ["PATH", "Label", "SPLIT"]):
        table = pa.table(dict(zip(names, (["a", "b"], [1.0, 2.0], ["train", "val"]), strict=True)))
        parquet.write_table(table, tmp_path / "index.parquet")
        rows = folders.read_index(tmp_path / "index.parquet")
        assert rows == folders.read_index(
            index(tmp_path, f"{','.join(names)}\na,1,train\nb,2,val\n")
        )
        assert [row.split for row in rows] == ["train", "test"]


def test_boxes_that_are_empty_are_none(tmp_path):
    text = "path,label,x_1,x_2,y_1,y_2\na,1,,nan,None,\nb,2,,,,\n"
    assert len(folders.read_index(index(tmp_path, text))) == 2
    with pytest.raises(ValueError, match="line 3: has a bounding box"):
        folders.read_index(index(tmp_path, text.replace("b,2,,", "b,2,0,")))


def test_absolute_paths_below_the_root(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    text = f"path,label\n{tmp_path}/a/x.jpg,1\na/y.jpg,2\n"
    for root in (tmp_path, tmp_path / "link", f"{tmp_path}/"):
        rows = folders.read_index(index(tmp_path, text), root=root)
        assert [row.path for row in rows] == ["a/x.jpg", "a/y.jpg"]
    for path in (f"{tmp_path}x/a.jpg", "/etc/passwd", f"{tmp_path}/../a.jpg", "s3://bucket/a.jpg"):
        with pytest.raises(ValueError, match="index.csv, line 2: the path is .*inside --data_dir"):
            folders.read_index(index(tmp_path, f"path,label\n{path},1\nb,2"), root=tmp_path)
    with pytest.raises(ValueError, match="line 3: a/x.jpg was listed in line 2 already"):
        folders.read_index(index(tmp_path, text.replace("a/y", "./a//x")), root=tmp_path)


@settings(
    max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 60),
            st.integers(0, 10),
            st.sampled_from([b"", b"\0", b'"', b"\n", b"\r", b",", b"../", b"\xff", b" "]),
        ),
        max_size=4,
    )
)
def test_fuzzed_tables(tmp_path, changes):
    data = b"path,label,split\na.jpg,1,train\nb.jpg,1,train\nc.jpg,2,test\nd.jpg,2,test\n"
    for start, length, piece in changes:
        data = data[:start] + piece + data[start + length :]
    try:
        rows = folders.read_index(index(tmp_path, data))
    except ValueError as error:
        assert "index.csv" in str(error)
    else:
        assert all(paths.is_inside_root(row.path) and row.split in listings.SPLITS for row in rows)
