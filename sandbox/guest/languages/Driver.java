// Java that keeps its variables from one piece of code to the next, by the JDK's own shell: see __init__.py.

import java.io.ByteArrayOutputStream;
import java.io.DataInputStream;
import java.io.FileInputStream;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.OutputStream;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.List;
import java.util.Locale;
import jdk.jshell.Diag;
import jdk.jshell.EvalException;
import jdk.jshell.JShell;
import jdk.jshell.Snippet;
import jdk.jshell.SnippetEvent;
import jdk.jshell.SourceCodeAnalysis;

public class Driver {
  private static final String[] IMPORTS = {
    "java.io.*", "java.math.*", "java.net.*", "java.nio.file.*", "java.util.*", "java.util.concurrent.*",
    "java.util.function.*", "java.util.prefs.*", "java.util.regex.*", "java.util.stream.*"
  };

  private final DataInputStream requests;
  private final OutputStream answers;
  private final JShell shell;

  Driver(String requests, String answers) throws IOException {
    this.requests = new DataInputStream(new FileInputStream("/proc/self/fd/" + requests));
    this.answers = new FileOutputStream("/proc/self/fd/" + answers);
    // In this process: what it prints is printed here, and there is no connection to another one.
    shell = JShell.builder().executionEngine("local").build();
    for (String one : IMPORTS) {
      shell.eval("import " + one + ";");
    }
  }

  public static void main(String[] arguments) throws IOException {
    new Driver(arguments[0], arguments[1]).serve();
  }

  private void serve() throws IOException {
    while (true) {
      int count = number();
      if (count < 0) {
        System.exit(0);
      }
      List<String> texts = new ArrayList<>();
      for (int i = 0; i < count; i++) {
        byte[] data = new byte[number()];
        requests.readFully(data);
        texts.add(new String(data, StandardCharsets.UTF_8));
      }
      become(texts.subList(1, count));
      List<String> answer = run(texts.get(0));
      System.out.flush();
      System.err.flush();
      tell(answer);
    }
  }

  /** Variables of the environment are properties here: a process cannot change its own environment. */
  private static void become(List<String> changes) {
    for (String one : changes) {
      int at = one.indexOf('=');
      if (at < 0) {
        System.clearProperty(one);
      } else if (at > 0) {
        System.setProperty(one.substring(0, at), one.substring(at + 1));
      }
    }
  }

  private List<String> run(String code) {
    SourceCodeAnalysis analysis = shell.sourceCodeAnalysis();
    String value = null;
    for (String left = code; !left.isBlank(); ) {
      SourceCodeAnalysis.CompletionInfo next = analysis.analyzeCompletion(left);
      String source = next.source() == null ? left : next.source();
      value = null;
      for (SnippetEvent event : shell.eval(source)) {
        if (event.causeSnippet() != null) {
          continue;
        }
        if (event.exception() != null) {
          return thrown(event.exception());
        }
        if (event.status() == Snippet.Status.REJECTED) {
          return rejected(event.snippet());
        }
        boolean shown = event.snippet().kind() == Snippet.Kind.EXPRESSION
            || event.snippet().subKind() == Snippet.SubKind.TEMP_VAR_EXPRESSION_SUBKIND;
        value = shown ? event.value() : null;
      }
      left = next.source() == null ? "" : next.remaining();
    }
    return value == null || value.isEmpty() ? List.of("ok") : List.of("ok", value);
  }

  private List<String> rejected(Snippet snippet) {
    StringBuilder trace = new StringBuilder();
    String first = "";
    for (Diag one : shell.diagnostics(snippet).toList()) {
      String message = one.getMessage(Locale.ENGLISH);
      first = first.isEmpty() && one.isError() ? message : first;
      trace.append(message).append('\n');
    }
    return List.of("error", "CompilationException", first, trace + snippet.source());
  }

  private static List<String> thrown(Exception error) {
    boolean own = error instanceof EvalException;
    String name = own ? ((EvalException) error).getExceptionClassName() : error.getClass().getName();
    String message = error.getMessage() == null ? "" : error.getMessage();
    StringBuilder trace = new StringBuilder(name + ": " + message);
    for (StackTraceElement one : error.getStackTrace()) {
      trace.append("\n    at ").append(one);
    }
    return List.of("error", name.substring(name.lastIndexOf('.') + 1), message, trace.toString());
  }

  /** The number in the next line; -1 at the end. */
  private int number() throws IOException {
    int found = 0;
    for (int one = requests.read(); one != '\n'; one = requests.read()) {
      if (one < 0) {
        return -1;
      }
      found = 10 * found + one - '0';
    }
    return found;
  }

  private void tell(List<String> texts) throws IOException {
    ByteArrayOutputStream all = new ByteArrayOutputStream();
    all.write((texts.size() + "\n").getBytes(StandardCharsets.UTF_8));
    for (String text : texts) {
      byte[] data = text.getBytes(StandardCharsets.UTF_8);
      all.write((data.length + "\n").getBytes(StandardCharsets.UTF_8));
      all.write(data);
    }
    answers.write(all.toByteArray());
    answers.flush();
  }
}
